// The list of adapters: which are chosen, with which weight, and the recipe that they ask for.

const byId = (id) => document.getElementById(id);

/** The guidance of a scale, in words. */
export function guidanceText(scale) {
  return scale > 1 ? `guidance ${scale}` : 'no guidance';
}

export class Adapters {
  /** The adapters of the server's status. */
  #list = [];
  /** Name to its checkbox, its slider and what shows the slider's value. */
  #rows = new Map();
  /** The recipe of the current choice. */
  #recipe = null;

  /** Called with the recipes of the last choice and of the new one, each null if there is none. */
  onchoose = () => {};

  /** Shows the adapters of a server status; keeps the choice if they are unchanged. */
  setList({ usable, updates }) {
    byId('adapters').hidden = usable.length === 0 && !updates;
    byId('refresh-adapters').hidden = !updates;
    const names = (list) => JSON.stringify(list.map(({ name, recipe }) => [name, recipe]));
    if (names(usable) === names(this.#list)) return;
    const [chosen, before] = [this.values(), this.#recipe];
    this.#list = usable;
    this.#rows = new Map(usable.map(({ name }, index) => [name, this.#row(name, index)]));
    byId('adapter-list').hidden = usable.length === 0;
    byId('adapter-list').replaceChildren(...[...this.#rows.values()].map(({ item }) => item));
    this.restore(chosen);
    this.onchoose(before, this.#recipe);
  }

  /** Chooses these adapters, as `values` has them. Those that the server does not have are left out. */
  restore(adapters) {
    for (const [name, { box, slider }] of this.#rows) {
      const chosen = adapters.find((adapter) => adapter.name === name);
      box.checked = Boolean(chosen);
      slider.value = chosen?.scale ?? 1;
      this.#show(name);
    }
    this.#recipe = this.recipe();
  }

  /** The chosen adapters, each `{ name, scale }`. */
  values() {
    return [...this.#rows]
      .filter(([, { box }]) => box.checked)
      .map(([name, { slider }]) => ({ name, scale: Number(slider.value) }));
  }

  /** The recipe that the chosen adapters ask for, or null. The server refuses two that differ. */
  recipe() {
    const used = this.values().filter(({ scale }) => scale !== 0);
    const recipes = used.map(({ name }) => this.#list.find((adapter) => adapter.name === name).recipe);
    return recipes.find(Boolean) ?? null;
  }

  /** The control that an error is shown at. */
  field() {
    const boxes = [...this.#rows.values()].map(({ box }) => box);
    return boxes.find((box) => box.checked) ?? boxes[0] ?? byId('refresh-adapters');
  }

  clearError() {
    for (const { box } of this.#rows.values()) box.removeAttribute('aria-invalid');
    byId('adapters-error').textContent = '';
  }

  /** A list item with a checkbox, and a slider for the weight. */
  #row(name, index) {
    const [item, label, weight] = ['li', 'label', 'div'].map((tag) => document.createElement(tag));
    const [box, slider, shown] = ['input', 'input', 'output'].map((tag) => document.createElement(tag));
    Object.assign(box, { type: 'checkbox', name: 'adapters', value: name, id: `adapter-${index}` });
    Object.assign(slider, { type: 'range', name: 'adapters', min: 0, max: 2, step: 0.05, value: 1 });
    Object.assign(slider, { id: `adapter-weight-${index}` });
    slider.setAttribute('aria-label', `Weight of ${name}`);
    shown.htmlFor = slider.id;
    weight.className = 'weight';
    label.append(box, name);
    weight.append(slider, shown);
    item.append(label, weight);
    for (const control of [box, slider]) {
      control.addEventListener('input', () => {
        this.#show(name);
        this.#choose();
      });
    }
    return { item, box, slider, shown, weight };
  }

  #choose() {
    const before = this.#recipe;
    this.#recipe = this.recipe();
    this.onchoose(before, this.#recipe);
  }

  #show(name) {
    const { box, slider, shown, weight } = this.#rows.get(name);
    weight.hidden = !box.checked;
    shown.textContent = Number(slider.value).toFixed(2);
  }
}
