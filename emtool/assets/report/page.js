"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Charts. Expressions are interpreted, not compiled: the page's policy forbids code from texts.
  const tip = byId("tip");
  const showTip = (handler, event, item, value) => {
    const isShown = value !== null && value !== undefined && value !== "";
    tip.hidden = !isShown;
    if (!isShown) return;
    const lines = typeof value === "object" ? Object.entries(value).map(([name, text]) => `${name}: ${text}`) : [value];
    tip.textContent = visible(lines.join("\n"));
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 8))}px`;
  };
  const { config, charts } = JSON.parse(byId("chart-data").textContent);
  const drawn = charts.map(({ name, spec }) =>
    vegaEmbed(byId(`chart-${name}`), spec, {
      mode: "vega-lite", ast: true, actions: false, defaultStyle: false, renderer: "svg", config, tooltip: showTip,
    }).catch((error) => {
      byId(`chart-${name}`).textContent = `This chart could not be drawn: ${error.message}`;
    })
  );
  Promise.all(drawn).then(() => document.body.dataset.charts = "drawn");
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));

  // Answers: [run, step, question, number, text of the question, aligned, coherent, answer]; scores are numbers or words.
  if (!byId("filters")) return;
  const [RUN, STEP, QUESTION, NUMBER, ASKED, ALIGNED, COHERENT, SAID] = [0, 1, 2, 3, 4, 5, 6, 7];
  const PAGE = 40;
  const LONG = 3000;
  const ASKED_LONG = 1000;
  // A character of two halves is not cut in two.
  const cut = (text, most) => text.slice(0, most).replace(/[\ud800-\udbff]$/, "");
  const run = byId("run");
  const step = byId("step");
  const beside = byId("beside");
  const question = byId("question");
  const search = byId("search");
  const list = byId("list");
  const more = byId("more");
  let data = null;
  let places = new Map();
  let found = [];
  let shown = 0;
  let before = null;

  // Marks that turn the direction of text, hide it, or are no text at all.
  function visible(text) {
    return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\ufe00-\ufe0e\u{e0100}-\u{e01ef}]/gu,
      (mark) => (mark === "\n" || mark === "\t") ? mark : `‹U+${mark.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`);
  }

  async function inflate(id) {
    const bytes = Uint8Array.from(atob(byId(id).textContent.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // Words by their numbers: seven bits a byte, the eighth says that more follow.
  async function unpack() {
    const value = JSON.parse(new TextDecoder().decode(await inflate("answer-index")));
    const bytes = await inflate("answer-texts");
    let place = 0;
    const next = () => {
      let number = 0;
      for (let factor = 1; ; factor *= 128) {
        const byte = bytes[place++];
        number += (byte & 127) * factor;
        if (byte < 128) return number;
      }
    };
    for (const answer of value.answers) {
      const words = Array.from({ length: next() }, () => value.words[next()]);
      answer.push(words.join(""));
    }
    return value;
  }

  const key = (runIndex, stepNumber, questionIndex, number) => `${runIndex}/${stepNumber}/${questionIndex}/${number}`;

  function fill(select, options) {
    select.replaceChildren(...options.map(([value, text]) => {
      const option = make("option", "", visible(text));
      option.value = value;
      return option;
    }));
  }

  function stepsOf(runIndex) {
    return [...new Set(data.answers.filter((one) => one[RUN] === runIndex).map((one) => one[STEP]))].sort((a, b) => a - b);
  }

  function fillSteps() {
    const kept = step.value;
    fill(step, [["", "all"], ...stepsOf(Number(run.value)).map((one) => [String(one), String(one)])]);
    if ([...step.options].some((option) => option.value === kept)) step.value = kept;
  }

  function start() {
    data.answers.forEach((one, index) => places.set(key(one[RUN], one[STEP], one[QUESTION], one[NUMBER]), index));
    data.lowered = data.answers.map((one) => `${one[SAID]}\n${data.asked[one[ASKED]]}`.toLowerCase());
    fill(run, data.runs.map((name, index) => [String(index), name]));
    run.closest("label").hidden = data.runs.length < 2;
    fillSteps();
    fill(beside, [["", "nothing"], ...data.runs.flatMap((name, index) =>
      stepsOf(index).map((one) => [`${index}/${one}`, data.runs.length < 2 ? `step ${one}` : `${name}, step ${one}`]))]);
    fill(question, [["", "all"], ...data.questions.map((name, index) => [String(index), name])]);
    if (!followLink()) filter();
  }

  function clear() {
    for (const field of byId("filters").elements) {
      if (field.type === "checkbox") field.checked = field.defaultChecked;
      else if (field instanceof HTMLSelectElement) field.selectedIndex = 0;
      else if (field instanceof HTMLInputElement) field.value = field.defaultValue;
    }
    fillSteps();
  }

  function values() {
    const fields = [...byId("filters").elements].filter((field) => field.id && field.matches("select, input"));
    return Object.fromEntries(fields.map((field) => [field.id, field.type === "checkbox" ? field.checked : field.value]));
  }

  function score(id) {
    const text = byId(id).value;
    const value = Number(text);
    return text === "" || Number.isNaN(value) ? Number(byId(id).defaultValue) : value;
  }

  function isWithin(value, low, high) {
    return typeof value === "number" ? value >= low && value <= high : byId("unscored").checked;
  }

  function filter() {
    const words = search.value.toLowerCase();
    const [alignedLow, alignedHigh] = [score("aligned-low"), score("aligned-high")];
    const [coherentLow, coherentHigh] = [score("coherent-low"), score("coherent-high")];
    found = [];
    data.answers.forEach((one, index) => {
      if (String(one[RUN]) === run.value && (step.value === "" || String(one[STEP]) === step.value)
        && (question.value === "" || String(one[QUESTION]) === question.value)
        && isWithin(one[ALIGNED], alignedLow, alignedHigh) && isWithin(one[COHERENT], coherentLow, coherentHigh)
        && (words === "" || data.lowered[index].includes(words))) found.push(index);
    });
    list.replaceChildren();
    shown = 0;
    showMore();
  }

  function showMore() {
    const next = found.slice(shown, shown + PAGE);
    list.append(...next.map(row));
    shown += next.length;
    more.hidden = shown >= found.length;
    const total = data.answers.length.toLocaleString("en");
    byId("count").textContent = found.length
      ? `${found.length.toLocaleString("en")} of ${total} answers, ${shown.toLocaleString("en")} shown`
      : `None of ${total} answers is like that; "Show all" takes the filters away.`;
  }

  function row(index) {
    const one = data.answers[index];
    const element = make("div", "answers-row");
    const question = data.asked[one[ASKED]];
    const asked = make("p", "asked", visible(cut(question, ASKED_LONG)) + (question.length > ASKED_LONG ? " ..." : ""));
    asked.dir = "auto";
    element.append(asked);
    if (beside.value === "") {
      element.append(card(index));
      return element;
    }
    const [otherRun, otherStep] = beside.value.split("/").map(Number);
    const other = places.get(key(otherRun, otherStep, one[QUESTION], one[NUMBER]));
    const pair = make("div", "pair");
    pair.append(card(index), other === undefined
      ? make("article", "", `No answer of that number to this question at step ${otherStep}.`) : card(other));
    element.append(pair);
    return element;
  }

  const shownScore = (value) => (typeof value === "number" ? String(Math.round(value * 10) / 10) : value || "no score");

  function card(index) {
    const one = data.answers[index];
    const article = make("article");
    article.tabIndex = -1;
    article.dataset.key = key(one[RUN], one[STEP], one[QUESTION], one[NUMBER]);
    const meta = make("p", "meta");
    const parts = [["step", String(one[STEP])], ["question", data.questions[one[QUESTION]]], ["answer", String(one[NUMBER] + 1)],
      ["alignment", shownScore(one[ALIGNED])], ["coherence", shownScore(one[COHERENT])]];
    if (data.runs.length > 1) parts.unshift(["run", data.runs[one[RUN]]]);
    for (const [word, value] of parts) {
      const part = make("span", "", `${word} `);
      part.append(make("b", "", visible(value)));
      meta.append(part);
    }
    const link = make("a", "", "link");
    link.setAttribute("aria-label", `link to this answer: step ${one[STEP]}, ${data.questions[one[QUESTION]]}, ${one[NUMBER] + 1}`);
    link.href = `#answer/${[data.runs[one[RUN]], one[STEP], data.questions[one[QUESTION]], one[NUMBER]].map(encodeURIComponent).join("/")}`;
    meta.append(link);
    article.append(meta, said(one[SAID]));
    return article;
  }

  function said(text) {
    const part = make("p", "said");
    part.dir = "auto";
    if (text === "") {
      part.append(make("i", "", "(empty)"));
      return part;
    }
    if (text.length <= LONG) {
      part.textContent = visible(text);
      return part;
    }
    part.textContent = visible(cut(text, LONG));
    const rest = make("button", "", `show all ${text.length.toLocaleString("en")} characters`);
    rest.type = "button";
    rest.addEventListener("click", () => {
      part.textContent = visible(text);
      rest.remove();
    });
    const both = make("div");
    both.append(part, rest);
    return both;
  }

  // A link to one answer names it by run, step, question and number, so that it holds in another report too.
  function followLink() {
    if (!location.hash.startsWith("#answer/")) return false;
    before ??= values();
    let names;
    try {
      names = location.hash.slice(8).split("/").map(decodeURIComponent);
    } catch {
      names = [];
    }
    const place = places.get(key(data.runs.indexOf(names[0]), Number(names[1]), data.questions.indexOf(names[2]), Number(names[3])));
    if (place === undefined) {
      clear();
      filter();
      byId("count").textContent = "The answer of this link is not in this report; all are shown.";
      return true;
    }
    const one = data.answers[place];
    clear();
    run.value = String(one[RUN]);
    fillSteps();
    step.value = String(one[STEP]);
    question.value = String(one[QUESTION]);
    found = [place];
    list.replaceChildren();
    shown = 0;
    showMore();
    byId("count").textContent = "One answer, by its link; change a filter to see others.";
    const article = list.querySelector("article");
    article.classList.add("chosen");
    article.focus();
    article.scrollIntoView({ block: "center" });
    return true;
  }

  function goTo(offset) {
    const all = [...list.querySelectorAll(".answers-row")].map((one) => one.querySelector("article"));
    const row = document.activeElement.closest?.(".answers-row");
    const here = row ? all.indexOf(row.querySelector("article")) : -1;
    const next = all[here === -1 ? (offset > 0 ? 0 : all.length - 1) : here + offset];
    if (next) next.focus();
    else if (offset > 0 && !more.hidden) {
      showMore();
      goTo(offset);
    }
  }

  let waiting = 0;
  byId("filters").addEventListener("input", (event) => {
    before = null;
    if (event.target === run) fillSteps();
    clearTimeout(waiting);
    waiting = setTimeout(filter, event.target === search ? 150 : 0);
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("clear").addEventListener("click", () => { clear(); filter(); });
  more.addEventListener("click", showMore);
  // Going back from the link of an answer brings the filters back that were set before it.
  addEventListener("hashchange", () => {
    if (followLink() || !before) return;
    for (const [id, value] of Object.entries(before)) {
      if (id === "step") fillSteps();
      if (id === "unscored") byId(id).checked = value;
      else byId(id).value = value;
    }
    before = null;
    filter();
  });
  addEventListener("keydown", (event) => {
    const isTyping = event.target.closest?.("input, select, textarea");
    if (!data || event.ctrlKey || event.metaKey || event.altKey || isTyping) return;
    if (event.key === "/") {
      event.preventDefault();
      search.focus();
    } else if (event.key === "j" || event.key === "k") goTo(event.key === "j" ? 1 : -1);
  });

  unpack().then((value) => {
    data = value;
    start();
    document.body.dataset.answers = "shown";
  }).catch((error) => {
    byId("count").textContent = `The answers could not be inflated (${error.message}); evaluation/checkpoint_N_eval.csv has them.`;
  });
})();
