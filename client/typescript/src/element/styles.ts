/** Styles of `<calotype-view>`. A page can change them with the custom properties of `:host` and with `::part()`. */

export const STYLES = `
:host {
  --_ink: var(--calotype-ink, light-dark(#2b211b, #eadfce));
  --_faint: var(--calotype-faint, light-dark(#6c5c4e, #b3a391));
  --_line: var(--calotype-line, light-dark(#d8cbb4, #41352c));
  --_accent: var(--calotype-accent, light-dark(#8a3b1e, #f08a5d));
  --_accent-ink: var(--calotype-accent-ink, light-dark(#fffaf0, #1a120e));
  --_paper: var(--calotype-paper, light-dark(#f2e8c6, #2a221c));
  --_alarm: var(--calotype-alarm, light-dark(#8c1d18, #ff9d8a));
  display: block;
  color: var(--_ink);
  font: inherit;
  container-type: inline-size;
}
:host([hidden]), [hidden] { display: none !important; }
* { box-sizing: border-box; }
.picture {
  position: relative;
  overflow: hidden;
  width: 100%;
  aspect-ratio: var(--_ratio, 1);
  border-radius: 2px;
  background:
    radial-gradient(120% 90% at 30% 20%, light-dark(#fffbe8, #3a2f26) 0%, transparent 60%),
    radial-gradient(90% 120% at 80% 90%, light-dark(#e4d39c, #1d1713) 0%, transparent 70%),
    var(--_paper);
}
.layer { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.track { height: 3px; margin-top: 2px; border-radius: 3px; background: var(--_line); overflow: hidden; }
.track.ended { visibility: hidden; }
.bar { height: 100%; width: 100%; background: var(--_accent); transform: scaleX(0); transform-origin: left; }
.status {
  margin: .45rem 0 0;
  min-height: 1.4em;
  font-size: .875em;
  line-height: 1.4;
  color: var(--_faint);
  font-variant-numeric: tabular-nums;
}
.filmstrip {
  margin-top: .35rem;
  height: 2.6rem;
  border-radius: 2px;
  background: color-mix(in srgb, var(--_line) 35%, transparent);
}
.strip { position: relative; height: 100%; width: min(100%, calc(var(--_frames, 0) * 4rem)); }
.frames { display: flex; gap: 1px; height: 100%; overflow: hidden; border-radius: 2px; }
.frames img { flex: 1 1 0; min-width: 0; height: 100%; object-fit: cover; }
input[type="range"] {
  -webkit-appearance: none;
  appearance: none;
  position: absolute;
  inset: 0;
  width: 100%;
  height: 100%;
  margin: 0;
  background: none;
  cursor: ew-resize;
  touch-action: pan-y;
}
input[type="range"]::-webkit-slider-runnable-track { height: 100%; }
input[type="range"]::-moz-range-track { height: 100%; }
input[type="range"]::-webkit-slider-thumb {
  -webkit-appearance: none;
  width: 6px;
  height: 100%;
  border: 0;
  border-radius: 3px;
  background: var(--_accent);
  box-shadow: 0 0 0 2px var(--_accent-ink);
}
input[type="range"]::-moz-range-thumb {
  width: 6px;
  height: 100%;
  border: 0;
  border-radius: 3px;
  background: var(--_accent);
  box-shadow: 0 0 0 2px var(--_accent-ink);
}
.notice { margin: .5rem 0 0; font-size: .875em; line-height: 1.45; color: var(--_faint); }
.error { margin-top: .6rem; padding-left: .75rem; border-left: 3px solid var(--_alarm); line-height: 1.45; }
.error p { margin: 0; font-size: .875em; }
.error .title { font-size: 1em; font-weight: 700; color: var(--_alarm); }
.error.neutral { border-color: var(--_line); }
.error.neutral .title { color: inherit; }
.error ul { margin: .3rem 0; padding-left: 1.1rem; font-size: .875em; }
.actions { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .6rem; }
.actions button, .actions a, .error button {
  font: inherit;
  font-size: .875em;
  line-height: 1.2;
  padding: .5em .9em;
  min-height: 2.25rem;
  display: inline-flex;
  align-items: center;
  border: 1px solid var(--_line);
  border-radius: 3px;
  background: transparent;
  color: inherit;
  text-decoration: none;
  cursor: pointer;
}
.error button { margin-top: .5rem; }
.actions button:hover, .actions a:hover, .error button:hover { border-color: var(--_accent); color: var(--_accent); }
:focus-visible { outline: 2px solid var(--_accent); outline-offset: 2px; }
.visually-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (forced-colors: active) {
  .bar { background: Highlight; }
  .error { border-color: LinkText; }
}
`;
