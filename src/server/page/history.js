// The list of the session's pictures.

const byId = (id) => document.getElementById(id);

export class History {
  /** Picture to its list item and object URL. The URL is revoked when the picture is removed. */
  #entries = new Map();

  /** Called with the picture that was clicked. */
  onchoose = () => {};

  /** Shows `pictures` in order and marks `chosen` as the current one. */
  show(pictures, chosen) {
    for (const [picture, { url }] of this.#entries) {
      if (pictures.includes(picture)) continue;
      URL.revokeObjectURL(url);
      this.#entries.delete(picture);
    }
    for (const picture of pictures) {
      if (!this.#entries.has(picture)) this.#entries.set(picture, this.#entry(picture));
      const { button } = this.#entries.get(picture);
      if (picture === chosen) button.setAttribute('aria-current', 'true');
      else button.removeAttribute('aria-current');
    }
    const items = pictures.map((picture) => this.#entries.get(picture).item);
    // Items in place are not moved, so that they keep the focus.
    const list = byId('pictures');
    items.forEach((item, index) => {
      if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
    });
    while (list.children.length > items.length) list.lastElementChild.remove();
    byId('history').hidden = pictures.length === 0;
  }

  #entry(picture) {
    const url = URL.createObjectURL(picture.file);
    const image = new Image();
    const button = document.createElement('button');
    const item = document.createElement('li');
    Object.assign(image, { loading: 'lazy', decoding: 'async', src: url, alt: label(picture) });
    button.type = 'button';
    button.title = picture.settings.prompt;
    button.append(image);
    button.addEventListener('click', () => this.onchoose(picture));
    item.append(button);
    return { item, button, url };
  }
}

function label({ settings, images, index }) {
  const which = images > 1 ? `, ${index + 1} of ${images}` : '';
  return `${settings.prompt}${which}, seed ${settings.seed}`;
}
