// The form of an active provider: offer only the keys and models of the chosen provider, and move rows. Optional.
"use strict";

const rows = [...document.querySelectorAll("[data-target]")];
const knownModels = document.getElementById("known-models");

function inputs(row) {
    const named = (name) => row.querySelector(`[name$="-${name}"]`);
    return { provider: named("provider"), key: named("api_key"), model: named("model") };
}

function offer(row, index) {
    const { provider, key, model } = inputs(row);
    for (const option of key.options) {
        const owner = option.dataset.provider;
        option.hidden = Boolean(owner) && owner !== provider.value;
        if (option.hidden && option.selected) key.value = "";
    }
    const own = document.getElementById(`known-models-${index}`) || document.createElement("datalist");
    own.id = `known-models-${index}`;
    own.replaceChildren(
        ...[...knownModels.options]
            .filter((option) => option.dataset.provider === provider.value)
            .map((option) => new Option(option.value, option.value)),
    );
    document.body.append(own);
    model.setAttribute("list", own.id);
}

function values(row) {
    const { provider, key, model } = inputs(row);
    return [provider.value, key.value, model.value];
}

function fill(row, index, [provider, key, model]) {
    const input = inputs(row);
    input.provider.value = provider;
    offer(row, index);
    input.key.value = key;
    input.model.value = model;
}

rows.forEach((row, index) => {
    offer(row, index);
    inputs(row).provider.addEventListener("change", () => offer(row, index));
    const up = row.querySelector("[data-up]");
    up.hidden = index === 0;
    up.addEventListener("click", () => {
        const [above, here] = [values(rows[index - 1]), values(row)];
        fill(rows[index - 1], index - 1, here);
        fill(row, index, above);
    });
    const empty = row.querySelector("[data-empty]");
    empty.hidden = false;
    empty.addEventListener("click", () => fill(row, index, ["", "", ""]));
});
