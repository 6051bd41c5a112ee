// Connects the form, the stage, the history and the server.

import { ConnectionError, get, key, post, startOfServer } from './api.js';
import { draw, estimate } from './drawing.js';
import { showGuide } from './guide.js';
import { History } from './history.js';
import { Jobs } from './jobs.js';
import { Settings } from './settings.js';
import { Stage } from './stage.js';
import { showStart } from './start.js';
import { Store } from './store.js';
import { about, before, count } from './wording.js';

/** Milliseconds between status requests. */
const POLL = 4000;
/** The same while the server starts. */
const START_POLL = 1000;
/** Milliseconds from a change of the settings to the next estimate. */
const SETTLE = 250;

const byId = (id) => document.getElementById(id);

const settings = new Settings();
const stage = new Stage();
const history = new History();
const store = new Store();
const jobs = new Jobs();

let status = null;
/** Whether the server may be starting. */
let isStarting = true;
/** Title of the stage of the start that is shown. */
let startTitle = '';
/** AbortController of the request in progress, or null. */
let drawing = null;
let chosen = null;
let timer = null;

const STATES = {
  loading: 'is starting',
  ready: 'is ready',
  draining: 'is shutting down',
  stopped: 'has stopped',
  failed: 'has failed',
};

/** Shows the server's start, or its status and an estimate, and repeats. */
async function poll() {
  clearTimeout(timer);
  let wait = POLL;
  try {
    if (!document.hidden && !drawing) wait = await update();
  } catch (error) {
    // 503: it was restarted.
    if (error.status === 503 && !isStarting) wait = 0;
    else showPollError(error);
    isStarting = true;
  }
  clearTimeout(timer);
  timer = setTimeout(poll, wait);
}

/** Returns the time to the next request. */
async function update() {
  if (isStarting && (await updateStart())) return START_POLL;
  isStarting = false;
  showStatus(await get('v1/status'));
  await updateForecast();
  return POLL;
}

/** Shows the server's start. Returns whether it goes on. */
async function updateStart() {
  const start = await startOfServer();
  const title = showStart(start);
  if (start && title !== startTitle) stage.announce(`${title}.`);
  startTitle = title;
  if (start) {
    byId('server').dataset.state = 'loading';
    byId('state').textContent = STATES.loading;
    byId('forecast').textContent = '';
  }
  return start !== null;
}

function showStatus(now) {
  const isNew = !status || status.model !== now.model || status.version !== now.version;
  status = now;
  byId('server').dataset.state = now.state;
  byId('model').textContent = now.model;
  byId('state').textContent = STATES[now.state] ?? now.state;
  const about = [`kiln ${now.version}`, now.device, now.dtype];
  byId('about-server').textContent = about.filter(Boolean).join(', ');
  byId('key-card').hidden = true;
  byId('forget-key').hidden = !key.get();
  settings.setLimits(now);
  byId('submit-job').hidden = !now.jobs?.available;
  jobs.show(now.jobs);
  if (isNew) {
    showGuide(now.prompt_guide, {
      onexample: (text) => {
        settings.write(text);
        stage.announce(`The prompt is: ${text}.`);
      },
      onword: (word) => {
        settings.insert(word);
        stage.announce(`${word} added to the prompt.`);
      },
    });
  }
}

function showPollError(error) {
  byId('forecast').textContent = '';
  if (error.status === 401) {
    askForKey(error);
    return;
  }
  byId('server').dataset.state = 'gone';
  byId('state').textContent = error instanceof ConnectionError ? 'does not answer' : 'has a problem';
  byId('forecast').textContent = error.message;
}

function askForKey(error) {
  byId('server').dataset.state = 'unknown';
  byId('state').textContent = 'needs a key';
  byId('key-card').hidden = false;
  byId('forget-key').hidden = true;
  if (key.get()) {
    key.forget();
    byId('key').setAttribute('aria-invalid', 'true');
    byId('key-error').textContent = `That key was refused: ${error.message}.`;
  }
}

/** Shows how long drawing with the current settings would take. */
async function updateForecast() {
  let text = '';
  try {
    if (settings.isPlausible()) text = forecast(await estimate(settings.request()));
  } catch (error) {
    if (error.status !== 400) throw error;
    text = error.message;
  }
  byId('forecast').textContent = text;
}

function forecast({ accepted, position, estimated_wait: wait, estimated_time: time }) {
  if (!accepted && status.state === 'ready') return 'The queue is full. Draw waits until there is room.';
  const takes = time === null ? '' : `takes ${about(time)}`;
  if (position === 0) return time === null ? 'Starts at once.' : `Starts at once, ${takes}.`;
  const starts = wait === null ? '' : `; it starts in ${about(wait)}`;
  return `${before(position)}${starts}${takes && ` and ${takes}`}.`;
}

async function start() {
  if (drawing) return;
  settings.clearErrors();
  const invalid = settings.inputError();
  if (invalid) {
    settings.showError(invalid.name, invalid.message);
    return;
  }
  drawing = new AbortController();
  const requested = settings.values();
  const button = byId('draw');
  button.setAttribute('aria-disabled', 'true');
  button.textContent = 'Drawing';
  byId('forecast').textContent = '';
  stage.begin(requested);
  try {
    const onProgress = (update) => stage.update(update);
    await keep(requested, await draw(settings.request(), drawing.signal, onProgress));
  } catch (error) {
    showFailure(error, requested);
  }
  // Moves the focus off an element that is hidden now.
  const active = document.activeElement;
  if (active === document.body || active.closest('[hidden]')) button.focus({ preventScroll: true });
  drawing = null;
  button.removeAttribute('aria-disabled');
  button.textContent = 'Draw';
  poll();
}

/** Stores and shows finished pictures. */
async function keep(requested, { files, facts }) {
  const [width, height] = facts.size.split('x').map(Number);
  const used = {
    ...requested,
    width,
    height,
    steps: facts.num_inference_steps,
    scale: requested.scale ?? status.defaults.true_cfg_scale,
    images: files.length,
    cache: requested.cache,
    // A given seed stays text, as large integers are not exact in JavaScript.
    seed: requested.seed || String(facts.seed),
  };
  const seconds = Object.values(facts.timings).reduce((sum, time) => sum + time, 0);
  const pictures = files.map((file, index) => ({
    settings: used,
    file,
    index,
    images: files.length,
    model: facts.model,
    skipped: facts.skipped_steps,
    warnings: facts.warnings,
    seconds,
    created: Date.now(),
  }));
  const [first] = await store.add(pictures);
  choose(first);
  stage.announce(`${count(files.length, 'picture is', 'pictures are')} drawn.`);
}

/** Stores the form as a job. */
async function submitJob() {
  settings.clearErrors();
  const invalid = settings.inputError();
  if (invalid) {
    settings.showError(invalid.name, invalid.message);
    return;
  }
  const button = byId('submit-job');
  button.disabled = true;
  try {
    await jobs.submit(settings.request());
    stage.announce('The job is stored.');
  } catch (error) {
    const name = settings.fieldOf(error.param);
    if (name) settings.showError(name, error.message);
    else jobs.showError(error);
    if (error.status === 401) askForKey(error);
  }
  button.disabled = false;
}

/** Shows the pictures of a completed job, which are kept like those that were drawn here. */
async function openJob(id) {
  if (drawing) return;
  const known = store.pictures.findLast((picture) => picture.job === id);
  if (known) {
    choose(known);
  } else {
    const [first] = await store.add(await jobs.pictures(id));
    choose(first);
  }
  byId('stage').scrollIntoView({ block: 'nearest' });
  stage.announce('The picture of the job is shown.');
}

function showFailure(error, requested) {
  if (drawing.signal.aborted) {
    stage.announce('Cancelled.');
    if (chosen) choose(chosen);
    else stage.showEmpty(requested);
    return;
  }
  const name = settings.fieldOf(error.param);
  const title = error.status < 500 ? 'The server refused the request:' : 'The server failed:';
  stage.showError({
    title: error.status ? title : '',
    text: error.message,
    canRetry: !name && error.status !== 401,
  });
  if (name) settings.showError(name, error.message);
  if (error.status === 401) {
    askForKey(error);
    byId('key').focus();
  }
  if (!(error.status || error instanceof ConnectionError)) console.error(error);
}

function choose(picture) {
  chosen = picture;
  if (picture) stage.showPicture(picture);
  else stage.showEmpty(settings.values());
  history.show(store.pictures, chosen);
}

byId('form').addEventListener('submit', (event) => {
  event.preventDefault();
  start();
});
byId('prompt').addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  start();
});
byId('submit-job').addEventListener('click', submitJob);
byId('again').addEventListener('click', start);
jobs.onopen = openJob;
jobs.onchange = (text) => stage.announce(text);
byId('cancel').addEventListener('click', () => drawing?.abort());

settings.onchange = () => {
  if (byId('stage').dataset.state === 'empty') stage.showEmpty(settings.values());
  clearTimeout(timer);
  timer = setTimeout(poll, SETTLE);
};
history.onchoose = (picture) => {
  if (!drawing) choose(picture);
};
byId('reuse').addEventListener('click', () => {
  settings.restore(chosen.settings);
  byId('draw').focus();
  stage.announce('The settings of this picture are in the form.');
});
byId('refresh-adapters').addEventListener('click', async () => {
  try {
    await post('v1/refresh_lora_adapters');
    showStatus(await get('v1/status'));
    stage.announce(`${count(status.adapters.usable.length, 'adapter', 'adapters')} can be used.`);
  } catch (error) {
    settings.showError('adapters', error.message);
  }
});
byId('remove').addEventListener('click', async () => {
  const index = store.pictures.indexOf(chosen);
  await store.remove([chosen]);
  choose(store.pictures[Math.min(index, store.pictures.length - 1)] ?? null);
  byId('stage').focus({ preventScroll: true });
  stage.announce('Removed.');
});
byId('clear').addEventListener('click', async () => {
  if (drawing || !confirm('Remove all pictures of this session?')) return;
  await store.remove(store.pictures);
  choose(null);
  byId('stage').focus({ preventScroll: true });
});

const useKey = () => {
  const value = byId('key').value.trim();
  if (!value) return;
  key.set(value);
  byId('key').value = '';
  byId('key').removeAttribute('aria-invalid');
  byId('key-error').textContent = '';
  poll();
};
byId('use-key').addEventListener('click', useKey);
byId('key').addEventListener('keydown', (event) => {
  if (event.key !== 'Enter') return;
  event.preventDefault();
  useKey();
});
byId('forget-key').addEventListener('click', () => {
  key.forget();
  location.reload();
});
document.addEventListener('visibilitychange', () => {
  if (document.hidden) return;
  poll();
  jobs.refresh();
});

await store.load();
choose(store.pictures[0] ?? null);
poll();
