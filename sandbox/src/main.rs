//! The sandbox: a guest, a host and the world on one machine, with the real `tapnat` on the host, real
//! traffic through it, and a picture of what happens. Started by `cargo xtask run --sandbox`, which
//! builds what it needs first.

mod flows;
mod guest;
mod instance;
mod leftovers;
mod play;
mod readings;
mod screen;

use std::{io, path::PathBuf, process::ExitCode};

use clap::Parser;

/// Show what tapnat does, in a network made for that.
#[derive(Debug, Parser)]
#[command(name = "tapnat-sandbox")]
struct Options {
    /// The `tapnat` program to run
    #[arg(long, value_name = "PROGRAM")]
    tapnat: PathBuf,

    /// Boot a real guest in QEMU, with the kernel in this directory, in place of a namespace that
    /// plays one
    #[arg(long, value_name = "GUEST KERNEL")]
    qemu: Option<PathBuf>,
}

fn main() -> ExitCode {
    match play::run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !is_broken_pipe(&error) {
                eprintln!("error: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Whether nobody reads our output any more, who then needs no message either.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// Whether colours are on is known to the whole process: tests that set it take
/// turns.
#[cfg(test)]
static COLOURS: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }
}
