// The server's jobs of this API key: submitted here or by other clients, and drawn whether or not a page
// is open.

import { file, get, post, remove, text } from './api.js';
import { withSeed } from './drawing.js';
import { before, count } from './wording.js';

const PATH = 'v1/images/jobs';
/** Milliseconds between looks at jobs that have not ended. */
const POLL = 2000;
/** Number of jobs that are shown. */
const SHOWN = 12;

const ENDED = { completed: 'Done', failed: 'Failed', cancelled: 'Cancelled' };

const byId = (id) => document.getElementById(id);

export class Jobs {
  /** Id to the list item of a job, and what it shows. */
  #items = new Map();
  #isShown = false;
  #timer = null;
  /** Counts refreshes: the answer of an earlier one is dropped. */
  #refreshes = 0;

  /** Called with the id of a completed job whose picture is wanted. */
  onopen = async () => {};

  /** Called with a text about a job that has ended. */
  onchange = () => {};

  /** Shows the jobs if the server's status has some; null hides them. */
  show(status) {
    const isNew = Boolean(status) && !this.#isShown;
    this.#isShown = Boolean(status);
    if (isNew) this.refresh();
    if (!status) byId('jobs').hidden = true;
  }

  async submit({ seed, ...fields }) {
    const response = await post(PATH, withSeed(seed, fields));
    await response.json();
    await this.refresh();
  }

  /** Looks at the jobs, and again while some have not ended. */
  async refresh() {
    clearTimeout(this.#timer);
    if (!this.#isShown) return;
    const number = (this.#refreshes += 1);
    let isBusy = true;
    try {
      const { data } = await get(`${PATH}?limit=${SHOWN}`);
      if (number !== this.#refreshes) return;
      this.#list(data);
      this.showError(null);
      isBusy = data.some(({ status }) => !(status in ENDED));
    } catch (error) {
      if (number !== this.#refreshes) return;
      this.showError(error);
    }
    clearTimeout(this.#timer);
    if (isBusy && !document.hidden) this.#timer = setTimeout(() => this.refresh(), POLL);
  }

  showError(error) {
    byId('jobs-error').textContent = error?.message ?? '';
    byId('jobs').hidden = !error && this.#items.size === 0;
  }

  /** The pictures of a completed job, as the session's store takes them. */
  async pictures(id) {
    const body = await text(`${PATH}/${id}`);
    const job = JSON.parse(body);
    const { request } = job;
    const [width, height] = request.size.split('x').map(Number);
    const settings = {
      prompt: request.prompt,
      negative: request.negative_prompt ?? '',
      width,
      height,
      steps: request.num_inference_steps,
      scale: request.true_cfg_scale,
      images: request.n,
      cache: request.cache ?? 'off',
      adapters: request.loras ?? [],
      // Seeds have up to 64 bits, which numbers of JavaScript do not keep.
      seed: /"seed":\s*(\d+)/.exec(body)?.[1] ?? '',
    };
    const files = await Promise.all(job.files.map(({ index }) => file(`${PATH}/${id}/content?index=${index}`)));
    return files.map((content, index) => ({
      job: id,
      settings,
      file: content,
      index,
      images: files.length,
      model: job.model,
      warnings: job.warnings,
      seconds: job.completed_at - job.started_at,
      created: Date.now(),
    }));
  }

  #list(data) {
    const list = byId('job-list');
    const known = new Set(data.map(({ id }) => id));
    for (const [id, { item }] of this.#items) {
      if (known.has(id)) continue;
      item.remove();
      this.#items.delete(id);
    }
    data.forEach((job, index) => {
      if (!this.#items.has(job.id)) this.#items.set(job.id, newEntry());
      const entry = this.#items.get(job.id);
      this.#fill(entry, job);
      // Items in place are not moved, so that they keep the focus.
      if (list.children[index] !== entry.item) list.insertBefore(entry.item, list.children[index] ?? null);
    });
  }

  #fill(entry, job) {
    const { id, status, progress, request, error } = job;
    const isRunning = status === 'in_progress';
    entry.name.textContent = request.prompt;
    entry.name.title = request.prompt;
    entry.state.textContent = stateOf(job);
    entry.bar.hidden = !isRunning;
    entry.bar.value = progress / 100;
    entry.bar.setAttribute('aria-label', `Progress of ${request.prompt}`);
    if (entry.status === status) return;
    if (entry.status && status in ENDED) {
      this.onchange(`A job has ended: ${ENDED[status]}${error ? `, ${error.message}` : ''}.`);
    }
    entry.status = status;
    const hasFocus = entry.buttons.contains(document.activeElement);
    const buttons = status in ENDED
      ? [status === 'completed' && ['Open', () => this.onopen(id)], ['Remove', () => this.#end(id)]]
      : [['Cancel', () => this.#end(id)]];
    entry.buttons.replaceChildren(...buttons.filter(Boolean).map(([label, act]) => this.#button(label, request, act)));
    if (hasFocus) entry.buttons.firstElementChild.focus();
  }

  #button(label, { prompt }, act) {
    const button = document.createElement('button');
    Object.assign(button, { type: 'button', textContent: label });
    button.setAttribute('aria-label', `${label}: ${prompt}`);
    button.addEventListener('click', async () => {
      try {
        await act();
      } catch (error) {
        this.showError(error);
      }
    });
    return button;
  }

  /** Cancels a job that has not ended, and removes one that has, with its files. */
  async #end(id) {
    const { item, status } = this.#items.get(id);
    const hasFocus = item.contains(document.activeElement);
    if (status in ENDED) await remove(`${PATH}/${id}`);
    else await post(`${PATH}/${id}/cancel`);
    await this.refresh();
    if (hasFocus && !item.isConnected) byId('submit-job').focus({ preventScroll: true });
  }
}

function newEntry() {
  const make = (name, className) => Object.assign(document.createElement(name), { className });
  const entry = {
    item: make('li', ''),
    name: make('p', 'name'),
    state: make('p', 'state'),
    buttons: make('div', 'buttons'),
    bar: document.createElement('progress'),
    status: null,
  };
  entry.item.append(entry.name, entry.state, entry.buttons, entry.bar);
  return entry;
}

function stateOf({ status, progress, queue_position: position, attempt, error, request }) {
  if (status === 'queued') return position ? before(position) : 'Waiting';
  if (status === 'in_progress') return `${progress} %${attempt > 1 ? `, attempt ${attempt}` : ''}`;
  if (status === 'failed') return `Failed: ${error?.message ?? 'no reason is known'}`;
  const pictures = count(request.n, 'picture', 'pictures');
  return status === 'completed' ? `Done, ${pictures}` : (ENDED[status] ?? status);
}
