// Copy buttons, and buttons that say that they are busy. Pages work without this file.
"use strict";

async function copyText(source) {
    const text = source.textContent;
    if (navigator.clipboard && window.isSecureContext) {
        await navigator.clipboard.writeText(text);
        return;
    }
    // Plain http beyond localhost has no clipboard API; selecting the text at least lets a person press Ctrl-C.
    const range = document.createRange();
    range.selectNodeContents(source);
    const selection = window.getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    if (!document.execCommand("copy")) throw new Error("the browser refused");
}

document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    copyText(document.getElementById(button.dataset.copy)).then(
        () => { button.textContent = "Copied"; },
        () => { button.textContent = "Press Ctrl-C"; },
    );
});

document.addEventListener("submit", (event) => {
    const button = event.submitter;
    if (button && button.dataset.busy) {
        button.textContent = button.dataset.busy;
        button.setAttribute("aria-busy", "true");
    }
});
