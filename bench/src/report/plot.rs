//! Comparisons as bars: the best figure, and a line from the first to the third quarter of the
//! rounds with a mark at the middle.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::{
    coord::Shift,
    prelude::{
        BLACK, Color as _, Cross, DrawingArea, IntoDrawingArea as _, IntoFont as _, PathElement,
        RGBColor, Rectangle, SVGBackend, Text, WHITE,
    },
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{Comparison, figure, quarters};

const WIDTH: i32 = 900;
const LEFT: i32 = 200;
const RIGHT: i32 = 120;
const TITLE: i32 = 40;
const ROW: i32 = 24;
const BAR: RGBColor = RGBColor(0x9d, 0xb8, 0xd9);
const OURS: RGBColor = RGBColor(0xe0, 0x8a, 0x3c);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws all of them, one below the other.
pub fn draw(comparisons: &[Comparison], path: &Path) -> Result<()> {
    let heights: Vec<_> = comparisons
        .iter()
        .map(|one| TITLE + ROW * i32::try_from(one.contenders.len()).unwrap_or(0) + ROW)
        .collect();
    let height: i32 = heights.iter().sum();
    let size = (WIDTH.cast_unsigned(), height.cast_unsigned());
    let root = SVGBackend::new(path, size).into_drawing_area();
    root.fill(&WHITE).map_err(|error| anyhow!("{error}"))?;
    let mut rest = root.clone();
    for (comparison, height) in comparisons.iter().zip(heights) {
        let (area, below) = rest.split_vertically(height);
        draw_one(comparison, &area)?;
        rest = below;
    }
    root.present().map_err(|error| anyhow!("{error}"))
}

fn draw_one(comparison: &Comparison, area: &Area<'_>) -> Result<()> {
    let failed = |error| anyhow!("{error}");
    let title = format!("{} ({})", comparison.title, comparison.unit);
    let bold = ("sans-serif", 16).into_font().color(&BLACK);
    area.draw(&Text::new(title, (10, 14), bold))
        .map_err(failed)?;
    let longest = comparison
        .contenders
        .iter()
        .flat_map(|one| {
            let [.., high] = quarters(one);
            [comparison.better.best(one.decisive()), high]
        })
        .fold(0.0, f64::max);
    let scale = f64::from(WIDTH - LEFT - RIGHT) / longest;
    let place = |value: f64| LEFT + (value * scale).round() as i32;
    let label = ("sans-serif", 13).into_font().color(&BLACK);
    let right = label.pos(Pos::new(HPos::Right, VPos::Center));
    let left = label.pos(Pos::new(HPos::Left, VPos::Center));
    for (row, one) in (0..).zip(&comparison.contenders) {
        let top = TITLE + row * ROW;
        let middle = top + ROW / 2 - 2;
        let best = comparison.better.best(one.decisive());
        let colour = if one.name.starts_with("tapnat") {
            OURS
        } else {
            BAR
        };
        area.draw(&Text::new(
            one.name.clone(),
            (LEFT - 8, middle),
            right.clone(),
        ))
        .map_err(failed)?;
        area.draw(&Rectangle::new(
            [(LEFT, top), (place(best), top + ROW - 5)],
            colour.filled(),
        ))
        .map_err(failed)?;
        let [low, median, high] = quarters(one).map(place);
        area.draw(&PathElement::new([(low, middle), (high, middle)], BLACK))
            .map_err(failed)?;
        area.draw(&Cross::new((median, middle), 3, BLACK))
            .map_err(failed)?;
        let end = place(best).max(high) + 8;
        area.draw(&Text::new(figure(best), (end, middle), left.clone()))
            .map_err(failed)?;
    }
    Ok(())
}
