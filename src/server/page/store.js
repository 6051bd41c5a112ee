// Stores the pictures of this session in IndexedDB, so that they survive a reload, or in memory only
// if IndexedDB is not available (as in some private windows).

const MAX_PICTURES = 100;
const MAX_BYTES = 256 * 2 ** 20;
/** Age in milliseconds after which the pictures of other sessions are deleted. */
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
  /** Newest first. */
  pictures = [];

  /** Loads the pictures of this session, and deletes old pictures of other sessions. */
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

  /** Adds the pictures of one request. Removes the oldest pictures beyond the limits. */
  async add(pictures) {
    const added = pictures.map((picture) => ({ ...picture, id: newId(), session: this.#session }));
    this.pictures.unshift(...added);
    await this.#try(() => Promise.all(added.map((picture) => done(this.#table().put(picture)))));
    let bytes = 0;
    const excess = this.pictures.findIndex(({ file }, index) => {
      bytes += file.size;
      return index >= MAX_PICTURES || (bytes > MAX_BYTES && index >= added.length);
    });
    if (excess >= 0) await this.remove(this.pictures.slice(excess));
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

  /** Logs a failure, such as a full disk: the picture is still in memory. */
  async #try(change) {
    if (!this.#database) return;
    try {
      await change();
    } catch (error) {
      console.warn('The history could not be saved:', error);
    }
  }
}
