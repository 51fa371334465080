// Earlier questions with their answers and traces, in the browser's own database. Nothing of it is ever sent.

const MOST = 30; // entries; the oldest are dropped

function done(request) {
  return new Promise((resolve, reject) => {
    request.addEventListener("success", () => resolve(request.result));
    request.addEventListener("error", () => reject(request.error));
  });
}

export class History {
  #database;

  constructor() {
    const request = indexedDB.open("llava-cot", 1);
    request.addEventListener("upgradeneeded", () => {
      request.result.createObjectStore("questions", { keyPath: "id", autoIncrement: true });
    });
    this.#database = done(request);
    this.#database.catch(() => {}); // each call below rejects instead
  }

  // The entries, the newest first.
  async all() {
    return (await done((await this.#store("readonly")).getAll())).reverse();
  }

  async add(entry) {
    const store = await this.#store("readwrite");
    await done(store.add(entry));
    const keys = await done(store.getAllKeys());
    await Promise.all(keys.slice(0, -MOST).map((key) => done(store.delete(key))));
  }

  async remove(id) {
    await done((await this.#store("readwrite")).delete(id));
  }

  async clear() {
    await done((await this.#store("readwrite")).clear());
  }

  async #store(mode) {
    return (await this.#database).transaction("questions", mode).objectStore("questions");
  }
}
