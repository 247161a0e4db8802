// A browser starts no Worker from file://. The search of the theme then takes this one, which runs
// the worker's script in a hidden frame of the same page.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      this.inside = frame.contentWindow;
      window.addEventListener("message", (event) => {
        if (event.source === this.inside && event.data.fromWorker !== undefined) {
          this.dispatchEvent(new MessageEvent("message", { data: event.data.fromWorker }));
        }
      });
      // Messages wait until the script has been read.
      this.ready = new Promise((done) => frame.addEventListener("load", done, { once: true }));
      this.inside.document.open();
      this.inside.document.write(`<body><script>
        self.postMessage = (data) => parent.postMessage({ fromWorker: data }, "*");
      </script><script src="${url}"></script></body>`);
      this.inside.document.close();
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
