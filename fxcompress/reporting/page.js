"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const has = (element, text) => element.textContent.toLowerCase().includes(text);
  for (const element of all(".controls, #theme, #graph-hint")) element.hidden = false;

  // ---------------------------------------------------------------- theme
  const themes = ["auto", "dark", "light"];
  const theme = byId("theme");
  const setTheme = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    theme.textContent = `Theme: ${name}`;
  };
  const memory = (name) => {  // a page from a file may have none
    try {
      if (name) localStorage.setItem("fxcompress-theme", name);
      return localStorage.getItem("fxcompress-theme");
    } catch (error) {
      return name || null;
    }
  };
  let current = themes.includes(memory()) ? memory() : "auto";
  setTheme(current);
  theme.addEventListener("click", () => {
    current = themes[(themes.indexOf(current) + 1) % themes.length];
    memory(current);
    setTheme(current);
  });

  // ---------------------------------------------------------------- where one is
  const links = new Map(all("nav a").map((link) => [link.getAttribute("href").slice(1), link]));
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -75% 0px" });
  for (const section of all("main > section")) watcher.observe(section);

  // ---------------------------------------------------------------- layers
  const layerTable = byId("layer-table");
  if (layerTable) {
    const body = layerTable.tBodies[0];
    const rows = [...body.rows];
    const filter = () => {
      const text = byId("layer-find").value.trim().toLowerCase();
      const onlyChanged = byId("layer-changed").checked;
      let shown = 0;
      for (const row of rows) {
        row.hidden = !has(row, text) || (onlyChanged && row.dataset.changed === "no");
        shown += !row.hidden;
      }
      byId("layer-count").textContent = `${shown} of ${rows.length} layers`;
    };
    byId("layer-find").addEventListener("input", filter);
    byId("layer-changed").addEventListener("change", filter);
    filter();
    const bars = all(".size .bar", layerTable).map((svg) => {
      const rects = [...svg.children];
      return [rects, rects.map((rect) => parseFloat(rect.getAttribute("width")))];
    });
    byId("layer-relative").addEventListener("change", (event) => {
      for (const [rects, widths] of bars) {
        const most = event.target.checked ? Math.max(...widths) || 100 : 100;
        rects.forEach((rect, i) => rect.setAttribute("width", `${100 * widths[i] / most}%`));
      }
    });
    for (const head of all("th[data-sort]", layerTable)) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      const key = head.dataset.sort;
      button.addEventListener("click", () => {
        const first = key === "index" ? "ascending" : "descending";
        const other = key === "index" ? "descending" : "ascending";
        const order = head.getAttribute("aria-sort") === first ? other : first;
        for (const each of all("th[aria-sort]", layerTable)) each.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        rows.sort((a, b) => sign * (a.dataset[key] - b.dataset[key]) || a.dataset.index - b.dataset.index);
        body.append(...rows);
      });
    }
  }

  // ---------------------------------------------------------------- curves
  for (const figure of all("figure.curves")) {
    const list = figure.querySelector("[role=listbox]");
    const items = [...list.children];
    const lines = new Map(all(".curve", figure).map((line) => [line.dataset.curve, line]));
    let at = -1;
    const choose = (i) => {
      if (items[at]) {
        items[at].setAttribute("aria-selected", "false");
        lines.get(items[at].dataset.curve).classList.remove("chosen");
      }
      at = Math.max(0, Math.min(items.length - 1, i));
      items[at].setAttribute("aria-selected", "true");
      list.setAttribute("aria-activedescendant", items[at].id);
      const line = lines.get(items[at].dataset.curve);
      line.classList.add("chosen");
      line.parentNode.append(line);  // on top of the others
    };
    list.addEventListener("keydown", (event) => {
      const steps = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 };
      if (!(event.key in steps)) return;
      event.preventDefault();
      choose(steps[event.key]);
      items[at].scrollIntoView({ block: "nearest" });
    });
    items.forEach((item, i) => item.addEventListener("click", () => choose(i)));
    for (const [key, line] of lines) {
      line.addEventListener("click", () => {
        choose(items.findIndex((item) => item.dataset.curve === key));
        items[at].scrollIntoView({ block: "nearest" });
      });
    }
    choose(0);
  }

  // ---------------------------------------------------------------- refusals
  const refusalList = byId("refusal-list");
  if (refusalList) {
    const groups = all(":scope > details", refusalList).map((group) => [group, all("li", group)]);
    const total = groups.reduce((sum, [, places]) => sum + places.length, 0);
    const filter = () => {
      const text = byId("refusal-find").value.trim().toLowerCase();
      const name = byId("refusal-pass").value;
      let shown = 0;
      for (const [group, places] of groups) {
        const whole = has(group.querySelector("summary"), text);
        let here = 0;
        for (const place of places) {
          place.hidden = !whole && !has(place, text);
          here += !place.hidden;
        }
        group.hidden = !here || (name !== "" && group.dataset.pass !== name);
        shown += group.hidden ? 0 : here;
        if (text && here && !whole) group.open = true;
      }
      byId("refusal-count").textContent = `${shown} of ${total} places`;
    };
    byId("refusal-find").addEventListener("input", filter);
    byId("refusal-pass").addEventListener("change", filter);
  }

  // ---------------------------------------------------------------- graph
  const graph = byId("graph-list");
  if (graph) {
    const rows = all(".row", graph);
    const folds = all("details", graph);
    const svgNames = "http://www.w3.org/2000/svg";
    const layers = ["before", "after"].map((side) => {
      const svg = document.createElementNS(svgNames, "svg");
      svg.classList.add(side);
      svg.setAttribute("aria-hidden", "true");
      graph.append(svg);
      return { side, svg, key: side === "before" ? "b" : "a" };
    });

    /** What stands for a row now: itself, or the summary of the outermost folded group around it. */
    const standIns = () => {
      const found = new Map();
      const walk = (parent, folded) => {
        for (const child of parent.children) {
          if (child.classList.contains("row")) found.set(child, folded || child);
          else if (child.tagName === "DETAILS") walk(child, folded || (child.open ? null : child.firstElementChild));
        }
      };
      walk(graph, null);
      return found;
    };

    /** A line down a lane of the gutter for each source, with a branch to each reader. */
    const lanesOf = (buses) => {
      const free = [];
      for (const bus of buses.sort((a, b) => a.stop - a.start - (b.stop - b.start) || a.start - b.start)) {
        bus.lane = 0;
        while (free[bus.lane]?.some(([start, stop]) => bus.start < stop && start < bus.stop)) bus.lane += 1;
        (free[bus.lane] ||= []).push([bus.start, bus.stop]);
      }
      return free.length;
    };

    const statusOf = (row) => ["removed", "added"].find((name) => row.classList.contains(name)) || "";
    let drawn = [];
    const draw = () => {
      const box = graph.getBoundingClientRect();
      const seen = standIns();
      const middles = new Map();
      const middle = (element) => {
        if (!middles.has(element)) {
          const at = element.getBoundingClientRect();
          middles.set(element, at.height ? at.top - box.top + at.height / 2 : null);
        }
        return middles.get(element);
      };
      drawn = [];
      for (const { svg, key, side } of layers) {
        const width = svg.getBoundingClientRect().width;
        const buses = new Map();
        for (const row of rows) {
          const to = seen.get(row);
          const stop = middle(to);
          if (stop === null || !row.dataset[key]) continue;
          for (const source of row.dataset[key].split(",")) {
            const from = seen.get(rows[source]);
            const start = middle(from);
            if (from === to || start === null) continue;
            const bus = buses.get(from) || { from, at: start, start, stop: start, ends: new Map() };
            bus.ends.set(to, statusOf(row) || statusOf(rows[source]));
            bus.start = Math.min(bus.start, stop);
            bus.stop = Math.max(bus.stop, stop);
            buses.set(from, bus);
          }
        }
        const list = [...buses.values()];
        const count = lanesOf(list);
        const gap = Math.min(9, (width - 8) / Math.max(count, 1));
        const inner = side === "before" ? width : 0;
        const out = side === "before" ? -1 : 1;
        const paths = [];
        for (const bus of list) {
          const x = inner + out * (5 + gap * Math.min(bus.lane, 7) + (gap >= 9 ? 0 : gap * Math.max(0, bus.lane - 7)));
          for (const [to, status] of bus.ends) {
            const path = document.createElementNS(svgNames, "path");
            const end = middle(to);
            const turn = Math.min(5, Math.abs(x - inner), Math.abs(end - bus.at) / 2) * Math.sign(end - bus.at);
            const bend = out * Math.abs(turn);
            path.setAttribute("d", `M${inner},${bus.at} H${x - bend} Q${x},${bus.at} ${x},${bus.at + turn} `
              + `V${end - turn} Q${x},${end} ${x - bend},${end} H${inner}`);
            path.setAttribute("class", `edge ${status}`);
            drawn.push({ path, from: bus.from, to });
            paths.push(path);
          }
        }
        svg.replaceChildren(...paths);
      }
      light(document.activeElement);
    };

    let waiting = 0;
    const redraw = () => {
      cancelAnimationFrame(waiting);
      waiting = requestAnimationFrame(draw);
    };

    const light = (element) => {
      for (const lit of all(".row.lit", graph)) lit.classList.remove("lit");
      for (const { path, from, to } of drawn) {
        const on = from === element || to === element;
        path.classList.toggle("lit", on);
        if (on && path.parentNode) path.parentNode.append(path);
        if (on) for (const end of [from, to]) if (end !== element) end.classList.add("lit");
      }
    };

    const filter = () => {
      const text = byId("graph-find").value.trim().toLowerCase();
      const onlyChanged = byId("graph-changed").checked;
      let shown = 0;
      for (const row of rows) {
        row.hidden = !has(row, text) || (onlyChanged && row.classList.contains("same"));
        shown += !row.hidden;
      }
      for (const fold of folds) {
        fold.hidden = !fold.querySelector(".row:not([hidden])");
        if (text && !fold.hidden) fold.open = true;
      }
      byId("graph-count").textContent = `${shown} of ${rows.length} nodes`;
      redraw();
    };
    byId("graph-find").addEventListener("input", filter);
    byId("graph-changed").addEventListener("change", filter);

    // One stop of the Tab key for the list; arrow keys inside.
    const stops = all(".row, summary", graph);
    for (const stop of stops) stop.tabIndex = -1;
    let here = stops[0];
    if (here) here.tabIndex = 0;
    const goTo = (element) => {
      if (!element) return;
      here.tabIndex = -1;
      here = element;
      here.tabIndex = 0;
      here.focus();
    };
    const visible = () => stops.filter((stop) => stop.checkVisibility());
    const foldOf = (element) => (element.tagName === "SUMMARY" ? element.parentElement : null);
    const keys = {
      ArrowDown: (list, i) => goTo(list[i + 1]),
      ArrowUp: (list, i) => goTo(list[i - 1]),
      Home: (list) => goTo(list[0]),
      End: (list) => goTo(list.at(-1)),
      ArrowRight: (list, i) => {
        const fold = foldOf(here);
        if (fold && !fold.open) fold.open = true;
        else if (fold) goTo(list[i + 1]);
      },
      ArrowLeft: () => {
        const fold = foldOf(here);
        if (fold && fold.open) fold.open = false;
        else goTo((fold || here).parentElement.closest("details")?.firstElementChild);
      },
    };
    graph.addEventListener("keydown", (event) => {
      if (!(event.key in keys) || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      const list = visible();
      keys[event.key](list, list.indexOf(here));
    });
    graph.addEventListener("focusin", (event) => {
      if (event.target !== here && stops.includes(event.target)) {
        here.tabIndex = -1;
        here = event.target;
        here.tabIndex = 0;
      }
      light(event.target);
    });
    graph.addEventListener("focusout", () => light(null));
    const under = (event) => event.target.closest?.(".row, summary");
    graph.addEventListener("pointerover", (event) => light(under(event)));
    graph.addEventListener("pointerleave", () => light(document.activeElement));
    for (const fold of folds) fold.addEventListener("toggle", redraw);
    const setAll = (open) => () => {
      for (const fold of folds) fold.open = open;
      if (!here.checkVisibility()) {
        here.tabIndex = -1;
        here = visible()[0] || here;
        here.tabIndex = 0;
      }
    };
    byId("graph-open").addEventListener("click", setAll(true));
    byId("graph-close").addEventListener("click", setAll(false));
    new ResizeObserver(redraw).observe(graph);
    filter();
  }

  // ---------------------------------------------------------------- paper
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all("details:not([open])");
    for (const fold of closed) fold.open = true;
  });
  addEventListener("afterprint", () => {
    for (const fold of closed) fold.open = false;
  });
})();
