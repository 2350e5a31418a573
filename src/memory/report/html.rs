//! A report as one HTML page: nothing is fetched, so it can be mailed, attached and kept.
//!
//! The page holds the report's JSON as it is saved, and a script that draws it. What a number on it says, its
//! `data-value` says exactly.

use super::MemoryReport;

const STYLE: &str = include_str!("page/page.css");
const CHART: &str = include_str!("page/chart.js");
const SPANS: &str = include_str!("page/spans.js");
const BODY: &str = include_str!("page/report.html");
const SCRIPT: &str = include_str!("page/report.js");

impl MemoryReport {
    /// The peak and what it is made of, live bytes over time with passes and steps, per-step peaks, the ledger, the
    /// span tree, environment and settings: values on hover, zoom on the time axis, light and dark, no network.
    pub fn html(&self) -> String {
        let page = Page { title: "Memory report", body: BODY, script: SCRIPT };
        page.html(&self.json())
    }
}

/// A self-contained page in the look of the reports, for tools that show something else about them.
///
/// `script` is the body of an asynchronous function that runs after the page's own, with `DATA` (what
/// [`html`](Self::html) is given) and its functions at hand.
///
/// ```
/// use candle_ode::memory::Page;
///
/// let page = Page { title: "Two < three", body: "<p id=sum></p>", script: "byId('sum').textContent = DATA.sum" };
/// let html = page.html(r#"{"sum": 5}"#);
/// assert!(html.contains("<title>Two &lt; three</title>") && !html.contains("http"));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Page<'a> {
    /// Of the window, as plain text.
    pub title: &'a str,
    /// HTML.
    pub body: &'a str,
    /// JavaScript.
    pub script: &'a str,
}

impl Page<'_> {
    /// The page about `data`, a JSON text.
    pub fn html(&self, data: &str) -> String {
        let title = self.title.replace('&', "&amp;").replace('<', "&lt;");
        let Self { body, script, .. } = self;
        // In JSON `<` stands in strings alone, where it may be escaped: no text can end the element early.
        let data = data.replace('<', "\\u003c");
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <link rel=\"icon\" href=\"data:,\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n\
             <body>\n{body}<script type=\"application/json\" id=\"data\">{data}</script>\n\
             <script>\n\"use strict\";\n{CHART}{SPANS}(async () => {{\n{script}}})();\n</script>\n</body>\n</html>\n"
        )
    }
}
