//! The colours that stand for the same thing everywhere. They are seen only where
//! [`console::colors_enabled`] says so: on a terminal, without `NO_COLOR`.

use console::Style;

/// A guest's own address.
#[must_use]
pub fn inside() -> Style {
    Style::new().yellow()
}

/// The address that stands for a guest.
#[must_use]
pub fn outside() -> Style {
    Style::new().green()
}
