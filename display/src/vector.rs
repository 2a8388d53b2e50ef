//! Lines of text with boxes in them, as SVG: the boxes as strokes, the rest as text on the same grid.
//! Knows nothing of what is drawn.

use svg::{
    Document,
    node::element::{Path, Rectangle, Style, Text, path::Data},
};

/// A character's place, in units of the picture.
const WIDTH: f64 = 8.4;
const HEIGHT: f64 = 18.0;
const FONT: f64 = 14.0;
/// Around everything.
const MARGIN: f64 = 12.0;

/// Colours for bright and for dark surroundings.
const STYLE: &str = "
.back { fill: #ffffff } .box { stroke: #57606a; fill: none } text { fill: #1f2328 }
.out { fill: #1a7f37 } .in { fill: #0969da }
@media (prefers-color-scheme: dark) {
.back { fill: #0d1117 } .box { stroke: #8b949e } text { fill: #e6edf3 }
.out { fill: #3fb950 } .in { fill: #58a6ff }
}";

/// Where lines of a box go from the middle of their character, in characters.
type Arm = (f64, f64);
const UP: Arm = (0.0, -0.5);
const DOWN: Arm = (0.0, 0.5);
const LEFT: Arm = (-0.5, 0.0);
const RIGHT: Arm = (0.5, 0.0);

/// The lines of a character, if it is a piece of a box.
fn arms(character: char) -> Option<&'static [Arm]> {
    Some(match character {
        '─' => &[LEFT, RIGHT],
        '│' => &[UP, DOWN],
        '┌' => &[DOWN, RIGHT],
        '┐' => &[DOWN, LEFT],
        '└' => &[UP, RIGHT],
        '┘' => &[UP, LEFT],
        '├' => &[UP, DOWN, RIGHT],
        '┤' => &[UP, DOWN, LEFT],
        '┬' => &[DOWN, LEFT, RIGHT],
        _ => return None,
    })
}

/// An SVG document that shows these lines. They have no colours of a terminal; arrows get some.
#[must_use]
pub fn render(lines: &[String]) -> String {
    let columns = lines.iter().map(|line| line.chars().count()).max();
    let size = (
        at(columns.unwrap_or(0), WIDTH) + MARGIN,
        at(lines.len(), HEIGHT) + MARGIN,
    );
    let mut document = Document::new()
        .set("viewBox", (0, 0, size.0.ceil(), size.1.ceil()))
        .set("width", size.0.ceil())
        .set("height", size.1.ceil())
        .set("font-family", "ui-monospace, DejaVu Sans Mono, monospace")
        .set("font-size", FONT)
        .add(Style::new(STYLE))
        .add(
            Rectangle::new()
                .set("class", "back")
                .set("width", "100%")
                .set("height", "100%"),
        );
    let mut boxes = Data::new();
    let mut texts = Vec::new();
    for (row, line) in lines.iter().enumerate() {
        for (column, character) in line.chars().enumerate() {
            for (right, down) in arms(character).unwrap_or_default() {
                let (x, y) = (
                    at(column, WIDTH) + WIDTH / 2.0,
                    at(row, HEIGHT) + HEIGHT / 2.0,
                );
                let end = (x + right * WIDTH, y + down * HEIGHT);
                boxes = boxes.move_to((x, y)).line_to(end);
            }
        }
        texts.extend(
            words(line)
                .into_iter()
                .map(|(column, word)| text(row, column, word)),
        );
    }
    document = document.add(Path::new().set("class", "box").set("d", boxes));
    texts.into_iter().fold(document, Document::add).to_string()
}

/// Where a place begins.
fn at(number: usize, length: f64) -> f64 {
    u32::try_from(number).map_or(0.0, f64::from) * length + MARGIN
}

/// The words of a line, with their columns.
fn words(line: &str) -> Vec<(usize, String)> {
    let mut words = Vec::<(usize, String)>::new();
    let mut goes_on = false;
    for (column, character) in line.chars().enumerate() {
        let is_text = character != ' ' && arms(character).is_none();
        match words.last_mut() {
            Some((_, word)) if is_text && goes_on => word.push(character),
            _ if is_text => words.push((column, character.to_string())),
            _ => {}
        }
        goes_on = is_text;
    }
    words
}

fn text(row: usize, column: usize, word: String) -> Text {
    let class = match word.as_str() {
        "→" => Some("out"),
        "←" => Some("in"),
        _ => None,
    };
    let length = at(word.chars().count(), WIDTH) - MARGIN;
    let text = Text::new(word)
        .set("x", at(column, WIDTH))
        .set("y", at(row, HEIGHT) + HEIGHT / 2.0 + FONT / 3.0)
        // On the grid, whatever the font.
        .set("textLength", length);
    match class {
        Some(class) => text.set("class", class),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use svg::parser::Event;

    use super::*;

    #[test]
    fn what_it_says_is_read_back() {
        let lines = ["┌─ a<b ─┐", "│ → 1 &  ├──", "└───────┘"].map(str::to_owned);
        let document = render(&lines);
        let mut said = Vec::new();
        let mut strokes = 0;
        for event in svg::read(&document).unwrap() {
            match event {
                Event::Text(text) => said.push(text.trim().to_owned()),
                Event::Tag("path", _, attributes) => {
                    strokes = attributes["d"].matches('L').count();
                }
                Event::Error(error) => panic!("{error}: {document}"),
                _ => {}
            }
        }
        let said = said.join(" ");
        assert!(said.ends_with("a&lt;b → 1 &amp;"), "{said}");
        // Two for each piece of a box, three where a cable goes off.
        assert_eq!(strokes, 2 * (4 + 3 + 9) + 3, "{document}");
    }

    #[test]
    fn nothing_is_a_picture_too() {
        assert!(render(&[]).contains("<svg"));
    }
}
