//! Pictures of a run, as SVG files: pure functions from numbers to a file that is replaced in one go.

pub mod colour;
pub mod density;
pub mod loss;

use candle_ode::file::write_bytes_atomically;
use candle_ode::{OdeError, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::error::Error;
use std::path::Path;

/// A piece of the picture to draw on.
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// What goes wrong while drawing: nothing but bugs, since it is done in memory.
type Drawn = std::result::Result<(), Box<dyn Error>>;

const INK: RGBColor = RGBColor(0x33, 0x33, 0x33);
const FAINT: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);

/// Draws a picture of (width, height) pixels on white and writes it to `path`.
fn picture(path: &Path, size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Drawn) -> Result<()> {
    let mut svg = String::new();
    let drawn = (|| {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        draw(&root)?;
        root.present()?;
        Ok(())
    })();
    drawn.map_err(|error: Box<dyn Error>| OdeError::Format { path: path.to_owned(), reason: error.to_string() })?;
    // Defaults of SVG, spelled out at each of thousands of cells; and cells must not bleed into their neighbours.
    let svg = svg.replace(" opacity=\"1\"", "").replace(" stroke=\"none\"", "").replace(" stroke-width=\"1\"/>", "/>");
    let svg = dots_alike(&svg);
    let svg = svg.replacen(">\n", ">\n<style>rect{shape-rendering:crispEdges}</style>\n", 1);
    write_bytes_atomically(path, svg.as_bytes())
}

/// Says once what thousands of dots look like: the opacity and colour of the first, if all share them.
fn dots_alike(svg: &str) -> String {
    let look = |line: &str| {
        let (_, rest) = line.trim_start().strip_prefix("<circle ")?.split_once(" opacity=\"")?;
        let (opacity, rest) = rest.split_once("\" fill=\"")?;
        Some((opacity.to_owned(), rest.strip_suffix("\"/>")?.to_owned()))
    };
    let dots = || svg.lines().filter(|line| line.starts_with("<circle "));
    let Some((opacity, fill)) = dots().next().and_then(look) else { return svg.to_owned() };
    let shared = format!(" opacity=\"{opacity}\" fill=\"{fill}\"/>");
    if !dots().all(|line| line.ends_with(&shared)) {
        return svg.to_owned();
    }
    let style = format!(">\n<style>circle{{opacity:{opacity};fill:{fill}}}</style>\n");
    svg.replace(&shared, "/>").replacen(">\n", &style, 1)
}

fn label(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK)
}

/// Text whose middle of the top edge is at (x, y).
fn heading(area: &Area<'_>, text: &str, size: u32, (x, y): (i32, i32)) -> Drawn {
    area.draw_text(text, &label(size).pos(Pos::new(HPos::Center, VPos::Top)), (x, y))?;
    Ok(())
}
