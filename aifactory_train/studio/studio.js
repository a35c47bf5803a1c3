// What the pages do beyond links and forms: a file that is dropped, a word while something runs, a run that is followed.
const busy = document.querySelector("[data-busy]");

for (const form of document.querySelectorAll("form[data-wait]")) {
  form.addEventListener("submit", () => {
    busy.textContent = "Working: " + form.dataset.wait + " …";
    form.setAttribute("aria-busy", "true");
    for (const button of form.querySelectorAll("button")) setTimeout(() => (button.disabled = true));
  });
}
// A page that is come back to is whole again.
window.addEventListener("pageshow", () => {
  busy.textContent = "";
  for (const button of document.querySelectorAll("button")) button.disabled = false;
});

// ---- files

const drop = document.querySelector("[data-drop]");
const chosen = document.querySelector("[data-upload]");
const send = async (files) => {
  if (files.length !== 1) {
    busy.textContent = "One file at a time; for several, name their folder.";
    return;
  }
  busy.textContent = "Copying " + files[0].name + " …";
  const address = "/data/upload?name=" + encodeURIComponent(files[0].name);
  try {
    const answer = await fetch(address, { method: "POST", body: files[0] });
    const found = await answer.json();
    if (answer.ok) location.href = "/data?file=" + encodeURIComponent(found.file);
    else busy.textContent = [found.where, found.error, found.fix].filter(Boolean).join(": ");
  } catch {
    busy.textContent = "The file could not be copied: the studio does not answer, or refused it.";
  }
};
if (drop && chosen) {
  chosen.addEventListener("change", () => chosen.files.length && send(chosen.files));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") send(event.dataTransfer.files);
    });
  }
}

// ---- a run

const live = document.querySelector("[data-events]");
if (live) {
  const part = (name) => live.querySelector("[data-" + name + "]");
  const charts = part("charts");
  const put = (place, html) => place.replaceChildren(document.createRange().createContextualFragment(html));
  const draw = (name, html) => {
    let place = charts.querySelector('[data-chart="' + name + '"]');
    if (!place) {
      place = document.createElement("div");
      place.dataset.chart = name;
      charts.append(place);
    }
    if (place.contains(document.activeElement)) return; // somebody reads it
    put(place, html);
    place.querySelector(".chart")?.dispatchEvent(new Event("aifactory:chart", { bubbles: true }));
  };
  const source = new EventSource(live.dataset.events);
  source.addEventListener("news", (event) => {
    const began = performance.now();
    const news = JSON.parse(event.data);
    put(part("status"), news.status);
    if (part("state").textContent !== news.state) part("state").textContent = news.state;
    const log = part("log");
    if (log.textContent !== news.log) {
      const below = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
      log.textContent = news.log;
      if (below) log.scrollTop = log.scrollHeight;
    }
    for (const [name, html] of Object.entries(news.charts)) draw(name, html);
    live.dataset.updateMs = String(performance.now() - began);
  });
  source.addEventListener("end", () => {
    source.close();
    live.dataset.over = "true";
  });
  source.addEventListener("error", () => (part("state").textContent = "the studio does not answer; the run goes on"));
}
