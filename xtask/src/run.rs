//! `cargo xtask run`: builds `tapnat` and becomes it, or builds the sandbox too and becomes that, so
//! that signals and the exit code are the program's own. What the sandbox does stands in `sandbox/`.

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::setup::{self, Group};
use crate::{build, command};

/// Build `tapnat` and run it, as in `cargo xtask run -- run --inside tap0=10.0.0.1/24`
#[derive(Args)]
#[group(skip)]
pub struct Options {
    #[command(flatten)]
    build: build::Options,

    /// Run it in a network made for that: a guest, a host and the world, with traffic and a picture
    #[arg(long, conflicts_with = "arguments")]
    sandbox: bool,

    /// In the sandbox, boot a real guest in QEMU
    #[arg(long, requires = "sandbox")]
    qemu: bool,

    /// What follows `--` goes to `tapnat` as it is
    #[arg(last = true, value_name = "TAPNAT ARGUMENTS")]
    arguments: Vec<OsString>,
}

/// Runs the verb. Returns only when the program could not be started.
pub fn run(options: Options) -> Result<()> {
    if options.sandbox {
        return sandbox(&options);
    }
    let tapnat = build::tapnat(&options.build)?;
    become_program(Command::new(tapnat).args(options.arguments))
}

fn sandbox(options: &Options) -> Result<()> {
    setup::ensure(&[Group::Build, Group::Sandbox])?;
    if options.qemu {
        setup::ensure(&[Group::Guest])?;
    }
    let tapnat = build::tapnat(&options.build)?;
    let sandbox = build::program("tapnat-sandbox", "tapnat-sandbox", &options.build)?;
    let mut command = as_root(&sandbox)?;
    command.arg("--tapnat").arg(tapnat);
    if options.qemu {
        command.arg("--qemu").arg(setup::guest_kernel_directory());
    }
    become_program(&mut command)
}

/// The command that runs a program as root, asking for the password where that is needed.
fn as_root(program: &Path) -> Result<Command> {
    if command::is_root() {
        return Ok(Command::new(program));
    }
    let Some(sudo) = command::find_program("sudo") else {
        bail!(
            "the sandbox makes network namespaces and loads eBPF programs, which needs root, and \
             there is no sudo: become root and run this command again"
        );
    };
    println!("run: the sandbox needs root, so sudo may ask for your password");
    let mut command = Command::new(sudo);
    // sudo keeps few variables.
    if let Some(value) = env::var_os("NO_COLOR") {
        let mut variable = OsString::from("NO_COLOR=");
        variable.push(value);
        command.arg("env").arg(variable);
    }
    command.arg(program);
    Ok(command)
}

fn become_program(command: &mut Command) -> Result<()> {
    let error = command.exec();
    let program = command.get_program().to_string_lossy().into_owned();
    Err(error).with_context(|| format!("cannot start {program}"))
}
