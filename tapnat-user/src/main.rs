//! The `tapnat` binary: the command line of `tapnat_user`, its errors on one line, its exit code.

use std::{
    env,
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::{Parser as _, error::ErrorKind};
use tapnat_user::cli::{Cli, on_one_line, with_verb};

/// The command line was wrong.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let arguments = with_verb(env::args_os().collect());
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() && !is_help(&error) => {
            // There is nobody else to tell.
            let _ = writeln!(io::stderr(), "tapnat: {}", on_one_line(&error));
            return ExitCode::from(USAGE);
        }
        // Help or the version was asked for, or nothing was.
        Err(error) => error.exit(),
    };
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            let (message, code) = match error.downcast_ref::<clap::Error>() {
                Some(error) => (on_one_line(error), ExitCode::from(USAGE)),
                None => (format!("{error:#}"), ExitCode::FAILURE),
            };
            // There is nobody else to tell.
            let _ = writeln!(io::stderr(), "tapnat: {message}");
            code
        }
    }
}

/// Whether the error is the whole help, in answer to a command line that stops short.
fn is_help(error: &clap::Error) -> bool {
    error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
}

fn run(cli: Cli) -> Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start")?
        .block_on(cli.execute())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage_error(arguments: &[&str]) -> String {
        let arguments = std::iter::once(&"tapnat").chain(arguments);
        let text = on_one_line(&Cli::try_parse_from(arguments).unwrap_err());
        assert!(!text.contains('\n'), "{text}");
        text
    }

    #[test]
    fn a_wrong_command_line_is_told_on_one_line() {
        assert_eq!(
            usage_error(&["forward", "add", "tcp", "80"]),
            "the following required arguments were not provided: <ADDRESS[:PORT[-PORT]]>"
        );
        let text = usage_error(&["run", "--inside", "tap0=10.0.0.1"]);
        assert!(
            text.ends_with(
                "10.0.0.1 has no prefix length: write 10.0.0.1/24 for a network of 254 guests"
            ),
            "{text}"
        );
        let text = usage_error(&["run", "--inside", "tap0=10.0.0.1/24", "--uplnk", "eth0"]);
        assert!(text.contains("tip:") && text.contains("--uplink"), "{text}");
        assert!(usage_error(&["flow"]).contains("flows"));
        let text = usage_error(&["who", "203.0.113.5:41234", "--at", "noonish"]);
        assert!(text.contains("write 14:02"), "{text}");
    }

    #[test]
    fn a_command_line_that_stops_short_gets_the_help() {
        for verbs in [
            &["tapnat"][..],
            &["tapnat", "forward"],
            &["tapnat", "static"],
        ] {
            let error = Cli::try_parse_from(verbs).unwrap_err();
            assert!(is_help(&error), "{verbs:?}");
            assert!(error.render().to_string().lines().count() > 5, "{error}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
