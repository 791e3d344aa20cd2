"use strict";
(() => {
  const AT_ONCE = 50;
  const data = JSON.parse(document.getElementById("data").textContent);
  const tuned = data.arms.length > 1 ? data.arms.indexOf(data.tuned) : -1;
  const list = document.getElementById("rows");
  const more = document.getElementById("more");
  const status = document.getElementById("shown");
  const buttons = [];
  // The errors of the tuned arm are the ones to mend; "" stands for every arm.
  const everything = { outcome: "", split: "", kind: "", text: "" };
  let state = { ...everything, arm: tuned < 0 ? "" : tuned };
  let chosen = [];
  let shown = 0;

  const right = (row, arm) => row.arms[arm][1];
  const others = (row) => row.arms.filter((_, arm) => arm !== tuned);
  const outcomes = {
    wins: (row) => right(row, tuned) && others(row).some((answered) => !answered[1]),
    loses: (row) => !right(row, tuned) && others(row).some((answered) => answered[1]),
    wrong: (row) => row.arms.every((answered) => !answered[1]),
  };
  for (const row of data.rows) {
    row.text = [row.question, ...row.gold, ...row.arms.map((answered) => answered[0])].join("\n").toLowerCase();
  }

  function matches(row, wanted) {
    if (wanted.outcome && !outcomes[wanted.outcome](row)) return false;
    if (wanted.split && row.split !== wanted.split) return false;
    if (wanted.kind) {
      const looked = wanted.arm === "" ? row.arms : [row.arms[wanted.arm]];
      if (!looked.some((answered) => answered[2] === wanted.kind)) return false;
    }
    return row.text.includes(wanted.text);
  }

  // Texts of rows only ever become text nodes, so nothing in them is markup.
  function element(name, className, ...content) {
    const made = document.createElement(name);
    if (className) made.className = className;
    made.append(...content);
    return made;
  }

  function group(name, entries) {
    const fieldset = element("fieldset", "", element("legend", "", name));
    for (const [label, change, counted] of entries) {
      const count = element("span", "count");
      const button = element("button", "", label, " ", count);
      button.type = "button";
      button.dataset.filter = label;
      buttons.push({ button, count, change, counted });
      button.addEventListener("click", () => {
        const pressed = button.getAttribute("aria-pressed") === "true";
        const released = Object.fromEntries(Object.keys(change).map((key) => [key, ""]));
        // Pressed again, a filter is taken back; an arm stays until another one is chosen.
        update(pressed && counted && label !== "all" ? { ...state, ...released } : { ...state, ...change });
      });
      fieldset.append(button);
    }
    return fieldset;
  }

  const search = element("input");
  search.type = "search";
  search.id = "search";
  search.placeholder = "search questions and answers";
  search.setAttribute("aria-label", "search questions and answers");
  search.addEventListener("input", () => update({ ...state, text: search.value.toLowerCase() }));

  const filters = document.getElementById("filters");
  const compared = tuned < 0 ? [] : [["tuned wins", { outcome: "wins" }, true], ["tuned loses", { outcome: "loses" }, true]];
  filters.append(group("Rows", [["all", everything, true], ...compared, ["all wrong", { outcome: "wrong" }, true]]));
  if (data.splits.length) filters.append(group("Questions", data.splits.map((split) => [split, { split }, true])));
  filters.append(group("Errors", Object.entries(data.kinds).map(([kind, label]) => [label, { kind }, true])));
  if (data.arms.length > 1) {
    const arms = data.arms.map((arm, place) => [arm, { arm: place }, false]);
    filters.append(group("Errors of", [["any arm", { arm: "" }, false], ...arms]));
  }
  filters.append(search);
  filters.addEventListener("submit", (event) => event.preventDefault());

  function update(next) {
    state = next;
    if (!state.text && search.value) search.value = "";
    for (const { button, count, change, counted } of buttons) {
      const pressed = Object.entries(change).every(([key, value]) => state[key] === value);
      button.setAttribute("aria-pressed", String(pressed));
      // How many rows would be there with this filter beside those of the other groups.
      const wanted = { ...state, ...change };
      if (counted) count.textContent = data.rows.filter((row) => matches(row, wanted)).length.toLocaleString("en");
    }
    chosen = data.rows.filter((row) => matches(row, state));
    shown = 0;
    list.replaceChildren();
    showMore();
  }

  function showMore() {
    const added = chosen.slice(shown, shown + AT_ONCE).map(article);
    shown += added.length;
    list.append(...added);
    const rows = chosen.length === 1 ? "row" : "rows";
    status.textContent = `${shown.toLocaleString("en")} of ${chosen.length.toLocaleString("en")} ${rows} shown`;
    more.hidden = shown === chosen.length;
    more.textContent = `Show ${Math.min(AT_ONCE, chosen.length - shown)} more`;
    return added;
  }
  more.addEventListener("click", () => showMore()[0].focus());

  function article(row) {
    const made = element("article", row.charts.length ? "" : "plain");
    made.tabIndex = -1;
    if (row.charts.length) made.append(element("div", "charts", ...row.charts.map((place) => chart(place, row))));
    const text = element("div");
    text.append(element("div", "tag row", [`row ${row.id}`, row.split].filter(Boolean).join(" · ")));
    text.append(element("p", "question", row.question || "(no question given)"));
    text.append(element("p", "gold", row.gold.length > 1 ? "Gold answers: " : "Gold answer: ", element("b", "", row.gold.join(" | "))));
    const answers = element("div", "answers");
    row.arms.forEach(([answer, isRight, kind], place) => {
      answers.append(element("span", "arm", data.arms[place]));
      const mark = element("span", isRight ? "right" : "wrong", isRight ? "✓ right" : "✗ wrong");
      const said = element("span", "answer", answer.trim() ? answer : element("span", "none", "(empty)"));
      if (kind && kind !== "empty") said.append(" ", element("span", "tag kind", data.kinds[kind]));
      answers.append(mark, said);
    });
    text.append(answers);
    made.append(text);
    return made;
  }

  function chart(place, row) {
    const image = element("img");
    image.loading = "lazy";
    image.decoding = "async";
    image.alt = `chart of row ${row.id}`;
    [image.src, image.width, image.height] = data.images[place];
    return image;
  }

  update(state);
})();
