// The area of the picture: empty, in progress, done, or an error.

import { about, before, count, measured, size as sizeText } from './wording.js';

const byId = (id) => document.getElementById(id);

export class Stage {
  #url = null;
  #stepsBegan = null;
  #quarter = 0;
  #live = byId('live');

  /** Shows an empty frame in the shape of the next picture. */
  showEmpty(size) {
    this.#state('empty');
    this.#picture(null, '');
    this.#frame(size);
  }

  begin(size) {
    this.#state('drawing');
    this.#picture(null, '');
    this.#frame(size);
    this.#stepsBegan = null;
    this.#quarter = 0;
    this.#progress('Sending the request', null);
    this.announce('Drawing.');
    byId('stage').scrollIntoView({ block: 'nearest' });
  }

  /** Shows a progress update of `draw`. */
  update(update) {
    if (update.stage === 'full') {
      this.#progress(`${update.message}. Trying again within ${update.seconds} s`, null);
      if (this.#quarter === 0) this.announce('The server is busy. Trying again soon.');
      this.#quarter = 1;
    } else if (update.stage === 'queued') {
      const text = queued(update);
      this.#progress(text, null);
      if (update.position > 0) this.announce(text);
    } else if (update.stage === 'step') {
      this.#step(update.step, update.steps);
    } else if (update.stage === 'preview') {
      this.#picture(update.file, `Preview after step ${update.step}`);
      byId('picture').classList.add('preview');
    }
  }

  #step(done, total) {
    const now = performance.now();
    this.#stepsBegan ??= { now, done };
    const since = done - this.#stepsBegan.done;
    const seconds = since > 0 ? ((now - this.#stepsBegan.now) / since / 1000) * (total - done) : 0;
    const left = seconds >= 1 ? `, ${about(seconds)} left` : '';
    this.#progress(done < total ? `Step ${done} of ${total}${left}` : 'Finishing', done / total);
    const quarter = Math.floor((done / total) * 4);
    if (quarter > this.#quarter && quarter < 4) this.announce(`${quarter * 25} percent drawn.`);
    this.#quarter = Math.max(quarter, this.#quarter);
    document.title = `${Math.floor((done / total) * 100)} % · kiln`;
  }

  showPicture(picture) {
    const { settings, images, index, model, skipped, seconds, warnings = [] } = picture;
    this.#state('done');
    this.#frame(settings);
    this.#picture(picture.file, settings.prompt);
    byId('caption').textContent = settings.prompt;
    const facts = [
      images > 1 && `${index + 1} of ${images}`,
      sizeText(settings),
      count(settings.steps, 'step', 'steps') + (skipped ? `, ${skipped} reused` : ''),
      settings.scale > 1 ? `guidance ${settings.scale}` : 'no guidance',
      `seed ${settings.seed}`,
      ...(settings.adapters ?? []).map(({ name, scale }) => `${name} ${scale}`),
      settings.negative.trim() && `without “${settings.negative.trim()}”`,
      model,
      `${measured(seconds)}`,
    ];
    byId('facts').textContent = facts.filter(Boolean).join(' · ');
    byId('warnings').replaceChildren(...warnings.map((text) => {
      const item = document.createElement('li');
      item.textContent = text;
      return item;
    }));
    Object.assign(byId('download'), { href: this.#url, download: fileName(picture) });
  }

  showError({ title = '', text, canRetry }) {
    this.#state('error');
    this.#picture(null, '');
    byId('error-title').textContent = title;
    byId('error-text').textContent = text;
    byId('again').hidden = !canRetry;
  }

  /** Announces a text to screen readers. */
  announce(text) {
    this.#live.textContent = text;
  }

  #state(name) {
    byId('stage').dataset.state = name;
    // A picture of the history cannot be shown while another is drawn.
    byId('history').inert = name === 'drawing';
    byId('empty').hidden = name !== 'empty';
    byId('progress').hidden = name !== 'drawing';
    byId('error').hidden = name !== 'error';
    byId('result').hidden = name !== 'done';
    byId('frame').hidden = name === 'error';
    document.title = 'kiln';
  }

  #progress(text, share) {
    byId('progress-text').textContent = text;
    if (share === null) byId('bar').removeAttribute('value');
    else byId('bar').value = share;
  }

  #frame({ width, height }) {
    const { style } = byId('frame');
    const isShape = width > 0 && height > 0;
    style.setProperty('--width', isShape ? width : 128);
    style.setProperty('--height', isShape ? height : 128);
  }

  #picture(file, alt) {
    const image = byId('picture');
    const old = this.#url;
    this.#url = file && URL.createObjectURL(file);
    image.classList.remove('preview');
    image.hidden = !file;
    image.alt = alt;
    if (file) image.src = this.#url;
    else image.removeAttribute('src');
    if (old) URL.revokeObjectURL(old);
  }
}

function queued({ position, estimated_wait: wait }) {
  if (position === 0) return 'Starting';
  return wait ? `${before(position)}, starting in ${about(wait)}` : before(position);
}

/** A file name from the words of the prompt and the seed. */
function fileName({ settings, index, file }) {
  const words = settings.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  const name = [...words.join('-')].slice(0, 48).join('').replace(/-$/, '') || 'picture';
  const extension = file.type.split('/')[1];
  return `${name}-${settings.seed}${index > 0 ? `-${index + 1}` : ''}.${extension}`;
}
