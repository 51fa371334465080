// The images of the question: dropped, pasted or chosen.

const THUMBNAIL = 96; // pixels of a side in the history

export class Images {
  #list;
  #files = [];
  #onWrong;

  constructor(input, list, drop, onWrong) {
    this.#list = list;
    this.#onWrong = onWrong;
    input.addEventListener("change", () => {
      this.add(input.files);
      input.value = "";
    });
    document.addEventListener("paste", (event) => {
      const files = event.clipboardData.files;
      if (!files.length) return;
      event.preventDefault();
      this.add(files);
    });
    const mark = (isOver) => (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      drop.classList.toggle("over", isOver);
    };
    document.addEventListener("dragover", mark(true));
    document.addEventListener("dragleave", mark(false));
    document.addEventListener("drop", (event) => {
      mark(false)(event);
      if (event.dataTransfer.files.length) this.add(event.dataTransfer.files);
    });
  }

  get files() {
    return [...this.#files];
  }

  add(files) {
    const wrong = [...files].filter((file) => !file.type.startsWith("image/"));
    this.#files.push(...[...files].filter((file) => !wrong.includes(file)));
    this.#onWrong(wrong.length ? `${wrong.map((file) => file.name).join(", ")} is no image.` : "");
    this.#show();
  }

  clear() {
    this.#files = [];
    this.#show();
  }

  #show() {
    for (const image of this.#list.querySelectorAll("img")) URL.revokeObjectURL(image.src);
    this.#list.replaceChildren(...this.#files.map((file) => this.#item(file)));
  }

  #item(file) {
    const item = document.createElement("li"), image = new Image(), remove = document.createElement("button");
    image.src = URL.createObjectURL(file);
    image.alt = file.name;
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    remove.addEventListener("click", () => {
      this.#files = this.#files.filter((other) => other !== file);
      this.#show();
      document.getElementById("files").focus();
    });
    item.append(image, remove);
    return item;
  }
}

export function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error(`${file.name} can't be read.`)));
    reader.readAsDataURL(file);
  });
}

// A small copy as a data URI, or null if the browser can't show the image.
export async function thumbnail(file) {
  try {
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, THUMBNAIL / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(scale * bitmap.width));
    canvas.height = Math.max(1, Math.round(scale * bitmap.height));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL();
  } catch {
    return null;
  }
}
