// The pictures of this session. They are kept in IndexedDB, which has room for them, so that they
// are there after a reload; where there is none (as in some private windows), only in memory.

const MAX_PICTURES = 100;
const MAX_BYTES = 256 * 2 ** 20;
/** Nobody comes back to a session after that. */
const MAX_AGE = 24 * 3600 * 1000;
const SESSION = 'kiln-session';

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

function open() {
  const request = indexedDB.open('kiln', 1);
  request.onupgradeneeded = () => {
    const pictures = request.result.createObjectStore('pictures', { keyPath: 'id' });
    pictures.createIndex('session', 'session');
  };
  return done(request);
}

const newId = () => crypto.getRandomValues(new Uint32Array(2)).join('-');

function session() {
  const id = sessionStorage.getItem(SESSION) ?? newId();
  sessionStorage.setItem(SESSION, id);
  return id;
}

export class Store {
  #session = session();
  #database = null;
  /** The newest first. */
  pictures = [];

  /** Brings back what this session has drawn, and drops what others have left. */
  async load() {
    try {
      this.#database = await open();
      const all = await done(this.#table().getAll());
      const oldest = Date.now() - MAX_AGE;
      await this.#drop(all.filter((picture) => picture.created < oldest && picture.session !== this.#session));
      const own = all.filter((picture) => picture.session === this.#session);
      this.pictures = own.sort((a, b) => b.created - a.created || a.index - b.index);
    } catch (error) {
      this.#database = null;
      console.warn('The history is kept in memory only:', error);
    }
  }

  /** Adds the pictures of one request; the oldest of the others may have to go. */
  async add(pictures) {
    const added = pictures.map((picture) => ({ ...picture, id: newId(), session: this.#session }));
    this.pictures.unshift(...added);
    await this.#try(() => Promise.all(added.map((picture) => done(this.#table().put(picture)))));
    let bytes = 0;
    const kept = this.pictures.findIndex(({ file }, index) => {
      bytes += file.size;
      return index >= MAX_PICTURES || (bytes > MAX_BYTES && index >= added.length);
    });
    if (kept >= 0) await this.remove(this.pictures.slice(kept));
    return added;
  }

  async remove(pictures) {
    this.pictures = this.pictures.filter((picture) => !pictures.includes(picture));
    await this.#try(() => this.#drop(pictures));
  }

  #table() {
    return this.#database.transaction('pictures', 'readwrite').objectStore('pictures');
  }

  #drop(pictures) {
    return Promise.all(pictures.map(({ id }) => done(this.#table().delete(id))));
  }

  /** A full disk costs the reload, not the picture. */
  async #try(change) {
    if (!this.#database) return;
    try {
      await change();
    } catch (error) {
      console.warn('The history could not be kept:', error);
    }
  }
}
