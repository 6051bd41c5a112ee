// The form with the prompt and the settings. Limits and defaults come from the server.

import { Adapters, guidanceText } from './adapters.js';
import { size as sizeText, count } from './wording.js';

const RATIOS = [
  { across: 1, down: 1, name: 'square' },
  { across: 4, down: 3, name: 'landscape' },
  { across: 3, down: 4, name: 'portrait' },
  { across: 16, down: 9, name: 'wide' },
  { across: 9, down: 16, name: 'tall' },
];

/** Field of the form for each parameter that a server error may name. */
const FIELDS = {
  messages: 'prompt',
  size: 'width',
  width: 'width',
  height: 'height',
  num_inference_steps: 'steps',
  true_cfg_scale: 'scale',
  n: 'images',
  cache: 'cache',
  seed: 'seed',
  negative_prompt: 'negative',
  lora: 'adapters',
  loras: 'adapters',
};

const NUMBERS = ['width', 'height', 'steps', 'scale', 'images'];

const byId = (id) => document.getElementById(id);

export class Settings {
  #form = byId('form');
  #limits = null;
  #defaults = null;
  #sizes = [];
  #adapters = new Adapters();

  /** Called when a setting other than the prompts changes. */
  onchange = () => {};

  constructor() {
    this.#form.addEventListener('input', ({ target }) => {
      this.clearError(target.name);
      if (target.name === 'ratio') this.#choose(target.value);
      this.#show();
      if (!['prompt', 'negative'].includes(target.name)) this.onchange();
    });
    this.#adapters.onchoose = (before, after) => this.#follow(before, after);
    byId('random-seed').addEventListener('click', () => {
      this.#field('seed').value = '';
      this.clearError('seed');
      this.#show();
      this.#field('seed').focus();
    });
  }

  /** Applies the limits and defaults of a server status; keeps the values if they are unchanged. */
  setLimits({ limits, defaults, adapters }) {
    this.#adapters.setList(adapters);
    const isKnown = JSON.stringify([limits, defaults]) === JSON.stringify([this.#limits, this.#defaults]);
    if (isKnown) return;
    [this.#limits, this.#defaults] = [limits, defaults];
    byId('fields').hidden = false;
    this.#sizes = RATIOS.map((ratio) => ({ ...ratio, ...sizeOf(ratio, limits, defaults) }));
    byId('tiles').replaceChildren(...this.#sizes.map(tile), tile(null));
    for (const name of ['width', 'height']) {
      Object.assign(this.#field(name), {
        min: limits.side_multiple,
        max: limits.max_side,
        step: limits.side_multiple,
      });
    }
    const megapixels = (limits.max_image_pixels / 1e6).toFixed(1);
    byId('sides-hint').textContent =
      `Multiples of ${limits.side_multiple}; at most ${megapixels} megapixels for all pictures together.`;
    this.#field('steps').max = limits.max_steps;
    this.#field('images').max = limits.max_num_images;
    this.#setCaches(defaults.cache);
    this.#field('negative').placeholder = (defaults.negative_prompt ?? '').trim();
    this.restore({
      prompt: this.#field('prompt').value,
      negative: '',
      width: defaults.width,
      height: defaults.height,
      steps: defaults.num_inference_steps,
      scale: defaults.true_cfg_scale,
      cache: this.#defaultCache(),
      images: 1,
      seed: '',
    });
  }

  /** Fills in the form. */
  restore({ adapters = [], ...values }) {
    // Pictures of earlier versions have no step cache and no adapters.
    for (const [name, value] of Object.entries({ cache: 'off', ...values })) {
      this.#field(name).value = value;
      this.clearError(name);
    }
    this.#adapters.restore(adapters);
    this.clearError('adapters');
    const known = this.#sizes.findIndex(({ width, height }) => width === values.width && height === values.height);
    this.#choose(known < 0 ? 'other' : String(known));
    this.#show();
    this.onchange();
  }

  /** The values of the form, as `restore` takes them. */
  values() {
    const text = (name) => this.#field(name).value;
    const numbers = NUMBERS.map((name) => [name, text(name) === '' ? undefined : Number(text(name))]);
    return {
      prompt: text('prompt'),
      negative: text('negative'),
      seed: text('seed').trim(),
      cache: text('cache'),
      adapters: this.#adapters.values(),
      ...Object.fromEntries(numbers),
    };
  }

  /** The form as a request. The server checks the values. */
  request() {
    const { prompt, negative, seed, width, height, steps, scale, images, cache, adapters } = this.values();
    const request = {
      prompt,
      seed,
      width,
      height,
      num_inference_steps: steps,
      true_cfg_scale: scale,
      n: images,
      // The server leaves its default out if there are few steps.
      cache: cache === this.#defaultCache() ? undefined : cache,
      loras: adapters.length > 0 ? adapters : undefined,
    };
    // Guidance needs a negative prompt, which may be blank.
    const blank = this.#isGuided() && this.#defaults?.negative_prompt == null ? ' ' : undefined;
    return { ...request, negative_prompt: negative === '' ? blank : negative };
  }

  /** Whether the server will probably accept the numbers. */
  isPlausible() {
    const { width, height, images } = this.values();
    const isWithin = NUMBERS.every((name) => {
      const { valid, stepMismatch, badInput, rangeOverflow, rangeUnderflow } = this.#field(name).validity;
      return valid || (stepMismatch && !badInput && !rangeOverflow && !rangeUnderflow);
    });
    return isWithin && width * height * images <= this.#limits?.max_image_pixels;
  }

  /** An error that is found without the server: the name of a field and a message. */
  inputError() {
    if (this.#field('prompt').value.trim() === '') {
      const instead = byId('guide').hidden ? '' : ', or choose an example';
      return { name: 'prompt', message: `Say what to draw${instead}.` };
    }
    const name = NUMBERS.find((number) => this.#field(number).validity.badInput);
    return name && { name, message: 'This is not a number.' };
  }

  /** The field for the parameter that a server error names. */
  fieldOf(param) {
    return FIELDS[String(param).split(/[.[]/)[0]];
  }

  showError(name, message) {
    const field = name === 'adapters' ? this.#adapters.field() : this.#field(name);
    field.setAttribute('aria-invalid', 'true');
    errorOf(name).textContent = message;
    if (['width', 'height'].includes(name)) this.#choose('other');
    for (let parent = field.parentElement; parent; parent = parent.parentElement) {
      if (parent.localName === 'details') parent.open = true;
    }
    field.focus();
  }

  clearError(name) {
    if (name === 'adapters') {
      this.#adapters.clearError();
      return;
    }
    const field = this.#form.elements.namedItem(name);
    if (!field?.id) return;
    field.removeAttribute('aria-invalid');
    const error = errorOf(name);
    if (error) error.textContent = '';
  }

  clearErrors() {
    [...NUMBERS, 'prompt', 'negative', 'seed', 'cache', 'adapters'].forEach((name) => this.clearError(name));
  }

  /** Inserts text into the prompt at the cursor. */
  insert(text) {
    const prompt = this.#field('prompt');
    const before = prompt.value.slice(0, prompt.selectionStart).trimEnd();
    const after = prompt.value.slice(prompt.selectionEnd).trimStart();
    const start = before ? `${before} ${text}` : text;
    this.write(after ? `${start} ${after}` : `${start} `);
    const end = start.length + 1;
    prompt.setSelectionRange(end, end);
  }

  /** Replaces the prompt. */
  write(text) {
    this.#field('prompt').value = text;
    this.clearError('prompt');
  }

  /** Adds the server's default to the caches, if it is none of them. */
  #setCaches(cache) {
    const field = this.#field('cache');
    field.querySelector('[value=default]')?.remove();
    if (typeof cache === 'object') field.add(new Option(`Default (${cache.mode})`, 'default'));
  }

  #defaultCache() {
    const cache = this.#defaults?.cache ?? 'off';
    return typeof cache === 'object' ? 'default' : cache;
  }

  #field(name) {
    return byId(name);
  }

  #scale() {
    return this.values().scale ?? this.#defaults?.true_cfg_scale;
  }

  /** What steps and guidance are with a recipe, or without one. */
  #asked(recipe) {
    return {
      steps: recipe?.num_inference_steps ?? this.#defaults?.num_inference_steps,
      scale: recipe?.true_cfg_scale ?? this.#defaults?.true_cfg_scale,
    };
  }

  /** Sets what another choice of adapters asks for, where the form still has what the last one asked for. */
  #follow(before, after) {
    if (!this.#defaults) return;
    const [old, asked] = [this.#asked(before), this.#asked(after)];
    const values = this.values();
    for (const name of ['steps', 'scale']) {
      if (values[name] !== old[name]) continue;
      this.#field(name).value = asked[name];
      this.clearError(name);
    }
  }

  /** Says which recipe the adapters have, and whether the form follows it. */
  #showRecipe({ steps, scale }) {
    const recipe = this.#adapters.recipe();
    const asked = this.#asked(recipe);
    const parts = [
      recipe?.num_inference_steps && { text: count(asked.steps, 'step', 'steps'), isSet: steps === asked.steps },
      recipe?.true_cfg_scale != null && { text: guidanceText(asked.scale), isSet: scale === asked.scale },
    ].filter(Boolean);
    const texts = (isSet) => parts.filter((part) => part.isSet === isSet).map(({ text }) => text).join(' and ');
    const lines = [
      texts(true) && `${texts(true)}, as ${recipe?.name} asks.`,
      texts(false) && `The recipe ${recipe?.name} asks for ${texts(false)}.`,
    ];
    const text = lines.filter(Boolean).join(' ');
    byId('recipe').textContent = text && text[0].toUpperCase() + text.slice(1);
    byId('steps-hint').textContent = !recipe?.num_inference_steps
      ? 'More steps take longer.'
      : `The recipe ${recipe.name} asks for ${count(asked.steps, 'step', 'steps')}.`;
  }

  #isGuided() {
    return this.#scale() > 1;
  }

  /** Selects a ratio by its index, or `other` for free width and height. */
  #choose(value) {
    const size = this.#sizes[value];
    if (size) {
      this.#field('width').value = size.width;
      this.#field('height').value = size.height;
      this.clearError('width');
    }
    for (const radio of this.#form.querySelectorAll('[name=ratio]')) radio.checked = radio.value === value;
    byId('sides').hidden = value !== 'other';
  }

  /** Updates the summaries of the size and of the collapsed settings. */
  #show() {
    const values = this.values();
    this.#showRecipe(values);
    byId('size-text').textContent = sizeText({ width: values.width ?? '?', height: values.height ?? '?' });
    const parts = [
      values.images > 1 && count(values.images, 'picture', 'pictures'),
      values.steps && count(values.steps, 'step', 'steps'),
      this.#isGuided() ? `guidance ${this.#scale()}` : 'no guidance',
      values.cache && values.cache !== 'off' && 'step cache',
      values.seed && `seed ${values.seed}`,
    ];
    byId('more-text').textContent = parts.filter(Boolean).join(', ');
  }
}

function errorOf(name) {
  return byId(`${['width', 'height'].includes(name) ? 'size' : name}-error`);
}

/** Width and height of a ratio with about as many pixels as the default size. */
function sizeOf({ across, down }, { side_multiple: multiple, max_side: max }, defaults) {
  const area = defaults.width * defaults.height;
  const side = (a, b) => {
    const exact = Math.sqrt((area * a) / b);
    return Math.min(Math.max(Math.round(exact / multiple), 1) * multiple, max);
  };
  return { width: side(across, down), height: side(down, across) };
}

/** A radio button that shows the shape of a ratio; without a ratio, the button `Other`. */
function tile(ratio, index) {
  const label = document.createElement('label');
  const radio = document.createElement('input');
  const shape = document.createElement('span');
  const name = document.createElement('span');
  Object.assign(radio, { type: 'radio', name: 'ratio', value: ratio ? String(index) : 'other' });
  shape.className = 'shape';
  if (ratio) {
    const scale = 22 / Math.max(ratio.across, ratio.down);
    shape.style.width = `${ratio.across * scale}px`;
    shape.style.height = `${ratio.down * scale}px`;
  } else {
    shape.classList.add('open');
  }
  name.textContent = ratio ? `${ratio.across}:${ratio.down}` : 'Other';
  if (ratio) {
    radio.setAttribute('aria-label', `${name.textContent}, ${ratio.name}, ${sizeText(ratio)}`);
    label.title = sizeText(ratio);
  }
  label.append(radio, shape, name);
  label.className = 'tile';
  return label;
}
