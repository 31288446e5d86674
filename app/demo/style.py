"""What the page looks like: a theme without fonts or files from elsewhere, light and dark, and the few rules it needs."""

from __future__ import annotations

from typing import Any

CSS = """
.gradio-container { max-width: 1240px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container main { width: 100% !important; max-width: none !important; }
.hasten-head { display: flex; align-items: baseline; gap: .75rem; flex-wrap: wrap; padding: .25rem 0 .5rem; }
.hasten-head h1 { font-size: 1.35rem; font-weight: 700; margin: 0; color: var(--body-text-color); }
.hasten-head span { color: var(--body-text-color-subdued); font-size: .9rem; }
.hasten-note { color: var(--body-text-color-subdued); font-size: .85rem; line-height: 1.45; margin: .25rem 0; }
.hasten-hint { border: 1px dashed var(--border-color-primary); border-radius: 8px; padding: 1.5rem 1rem; text-align: center;
  color: var(--body-text-color-subdued); }

.hasten-status { min-height: 2.4rem; font-size: .9rem; color: var(--body-text-color); }
.hasten-status p { margin: 0 0 .3rem; }
.hasten-bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.hasten-bar i { display: block; height: 100%; background: var(--color-accent); border-radius: 3px; transition: width .1s linear; }
.hasten-bar.unknown i { width: 30%; animation: hasten-slide 1.2s ease-in-out infinite alternate; }
@keyframes hasten-slide { from { margin-left: 0; } to { margin-left: 70%; } }
.hasten-status .wrap .error { display: none; }
.hasten-notice p { font-size: .88rem; margin: 0 0 .3rem; }
.hasten-status .failed, .hasten-notice .failed { color: var(--hasten-bad); font-weight: 600; overflow-wrap: anywhere; }

.hasten-pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: .75rem; margin: 0; }
.hasten-pictures figure, .hasten-strip figure { margin: 0; min-width: 0; }
.hasten-pictures img { width: 100%; height: auto; border-radius: 6px; border: 1px solid var(--border-color-primary); display: block; }
.hasten-small img { image-rendering: pixelated; }
.hasten-slider img { image-rendering: pixelated; }
.hasten-pictures figcaption { font-size: .82rem; line-height: 1.4; color: var(--body-text-color); padding-top: .3rem; }
.hasten-pictures figcaption small { color: var(--body-text-color-subdued); display: block; font-size: .78rem; }

.hasten-scroll { overflow-x: auto; max-width: 100%; margin: .75rem 0 .5rem; }
.hasten-table { border-collapse: collapse; width: 100%; margin: 0 !important; font-size: .83rem; font-variant-numeric: tabular-nums; }
.hasten-table, .hasten-table tr, .hasten-table tbody, .hasten-table thead { border: 0 !important; background: none !important; }
.hasten-table th, .hasten-table td { padding: .32rem .45rem !important; text-align: right !important; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; color: var(--body-text-color); white-space: nowrap; }
.hasten-table th { font-weight: 500 !important; color: var(--body-text-color-subdued) !important; }
.hasten-table th:first-child, .hasten-table td:first-child { text-align: left !important;
  font-weight: 600 !important; padding-left: 0 !important; }
.right { color: var(--hasten-good) !important; } .wrong { color: var(--hasten-bad) !important; }
:root { --hasten-good: #17734a; --hasten-bad: #b3372f; --hasten-compute: #1f5fa8; --hasten-reuse: #f2c879; --hasten-forecast: #7fb77e;
  --hasten-skip_branch: #b86f9b; }
.dark { --hasten-good: #5fd39a; --hasten-bad: #ff8f85; --hasten-compute: #3f86d6; --hasten-reuse: #d9a94e; --hasten-forecast: #67a866;
  --hasten-skip_branch: #c07fa6; }

.hasten-heat { margin: .35rem 0 .6rem; }
.hasten-heat .title { display: flex; justify-content: space-between; gap: .5rem; flex-wrap: wrap; font-size: .82rem; margin-bottom: .25rem;
  color: var(--body-text-color); }
.hasten-heat .legend { color: var(--body-text-color-subdued); display: flex; gap: .7rem; flex-wrap: wrap; }
.hasten-heat .legend i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px;
  margin-right: .3rem; vertical-align: -1px; }
.hasten-heat svg { width: 100%; display: block; border-radius: 4px; }
.hasten-heat .axis { display: flex; justify-content: space-between; font-size: .72rem; color: var(--body-text-color-subdued); }
.hasten-cells { display: grid; gap: 1px; }
.hasten-cells button { height: 18px; min-width: 0; padding: 0; border: 0; border-radius: 2px; cursor: pointer; }
.hasten-cells button:hover, .hasten-cells button:focus-visible { outline: 2px solid var(--body-text-color); outline-offset: 0; }
.compute { background: var(--hasten-compute); fill: var(--hasten-compute); }
.reuse { background: var(--hasten-reuse); fill: var(--hasten-reuse); }
.forecast { background: var(--hasten-forecast); fill: var(--hasten-forecast); }
.skip_branch { background: var(--hasten-skip_branch); fill: var(--hasten-skip_branch); }

.hasten-plot svg { width: 100%; height: auto; max-width: 560px; display: block; color: var(--body-text-color); }
.hasten-plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: .75rem; }

.hasten-strip { display: grid; gap: 4px; overflow-x: auto; padding: 2px; }
.hasten-strip figure { display: flex; flex-direction: column; }
.hasten-strip img { width: 100%; display: block; border-radius: 4px; border: 2px solid transparent; }
.hasten-strip .kept img { border-color: var(--color-accent); }
.hasten-strip figcaption { font-size: .7rem; color: var(--body-text-color-subdued); text-align: center;
  font-variant-numeric: tabular-nums; }
.hasten-strip b { font-size: .75rem; font-weight: 500; color: var(--body-text-color-subdued); text-align: center; }

.hasten-answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(270px, 100%), 1fr)); gap: .75rem; }
.hasten-answer { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .6rem .75rem; min-width: 0; }
.hasten-answer h3 { font-size: .88rem; margin: 0 0 .35rem; color: var(--body-text-color); }
.hasten-tokens { font-family: ui-monospace, monospace; font-size: .95rem; line-height: 1.9; overflow-wrap: anywhere; }
.hasten-tokens span { border-radius: 3px; padding: .1rem .18rem; margin: 0 1px; display: inline-block; min-width: .8em;
  text-align: center; white-space: pre; }
.hasten-tokens .mask { color: var(--body-text-color-subdued); }
.hasten-tokens .guess { color: var(--body-text-color-subdued); outline: 1px dashed var(--border-color-primary); }
.hasten-tokens .token { color: #10202e; }
.hasten-answer p { margin: .35rem 0 0; font-size: .82rem; color: var(--body-text-color); }
.hasten-answer small { color: var(--body-text-color-subdued); display: block; font-size: .78rem; }

.hasten-diff pre { font-size: .78rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-height: 16rem; overflow-y: auto;
  color: var(--body-text-color); }
@media (max-width: 640px) {
  .gradio-container { padding: .5rem !important; }
  .hasten-pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .hasten-table th, .hasten-table td { padding: .3rem .25rem !important; font-size: .78rem; }
  .hasten-table th, .hasten-table td:first-child { white-space: normal; }
  .hasten-cells { gap: 0; }
  .hasten-cells button { border-radius: 0; }
}
@media (prefers-reduced-motion: reduce) { .hasten-bar i { transition: none; animation: none !important; } }
"""


def theme() -> Any:
    """Gradio's plainest theme with the system's fonts."""
    import gradio

    fonts = ["system-ui", "sans-serif"]
    return gradio.themes.Base(
        primary_hue="blue", neutral_hue="slate", radius_size="md", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
