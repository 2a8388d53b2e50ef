//! The guest's whole file system: busybox, a few of this machine's programs
//! with their libraries, and kernel modules, as a cpio archive.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use cpio::newc;

use super::Kernel;
use crate::process::Command;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;

/// Files by their absolute path in the guest.
#[derive(Debug, Default)]
pub(super) struct Initramfs {
    files: BTreeMap<PathBuf, (u32, Vec<u8>)>,
}

impl Initramfs {
    /// Adds a file with these contents.
    pub(super) fn file(&mut self, path: impl Into<PathBuf>, mode: u32, contents: Vec<u8>) {
        self.files.insert(path.into(), (FILE | mode, contents));
    }

    /// Adds a file of this machine.
    pub(super) fn copy(&mut self, from: &Path, to: impl Into<PathBuf>) -> Result<()> {
        let read = || {
            let mode = fs::metadata(from)?.permissions().mode() & 0o777;
            Ok::<_, std::io::Error>((mode, fs::read(from)?))
        };
        let (mode, contents) = read().with_context(|| format!("cannot read {}", from.display()))?;
        self.file(to, mode, contents);
        Ok(())
    }

    /// Adds a program of this machine under /bin, with the libraries that it
    /// is linked to.
    pub(super) fn program(&mut self, program: &Path) -> Result<()> {
        let name = program.file_name().context("a program needs a name")?;
        self.copy(program, Path::new("/bin").join(name))?;
        // A static program makes ldd fail.
        let libraries = Command::new("ldd").arg(program).output()?.stdout;
        for library in libraries.lines().filter_map(library) {
            self.copy(Path::new(library), library)?;
        }
        Ok(())
    }

    /// Adds modules, and returns the paths to load them from, in order.
    pub(super) fn modules(&mut self, kernel: &Kernel, names: &[String]) -> Result<Vec<PathBuf>> {
        let mut order = Vec::new();
        for name in names {
            for file in dependencies(kernel, name)? {
                let name = file.file_stem().context("a module needs a name")?;
                let mut path = Path::new("/modules").join(name);
                path.set_extension("ko");
                if !order.contains(&path) {
                    self.file(&path, 0o644, read_module(&file)?);
                    order.push(path);
                }
            }
        }
        Ok(order)
    }

    /// Writes the archive.
    pub(super) fn write(&self, to: &Path) -> Result<()> {
        let write = || {
            let mut archive = std::io::BufWriter::new(fs::File::create(to)?);
            let mut directories = BTreeSet::new();
            for path in self.files.keys() {
                directories.extend(
                    path.ancestors()
                        .skip(1)
                        .filter(|path| path.parent().is_some()),
                );
            }
            // The archive's order is that of unpacking: directories first.
            for directory in directories {
                archive = entry(archive, directory, DIRECTORY, &[])?;
            }
            for (path, (mode, contents)) in &self.files {
                archive = entry(archive, path, *mode, contents)?;
            }
            newc::trailer(archive)?.flush()
        };
        write().with_context(|| format!("cannot write {}", to.display()))
    }
}

fn entry<W: Write>(
    archive: W,
    path: &Path,
    mode: u32,
    contents: &[u8],
) -> Result<W, std::io::Error> {
    let name = path.to_string_lossy();
    let builder = newc::Builder::new(name.trim_start_matches('/')).mode(mode);
    let length = u32::try_from(contents.len()).map_err(std::io::Error::other)?;
    let mut writer = builder.write(archive, length);
    writer.write_all(contents)?;
    writer.finish()
}

/// The file in a line of ldd's: `libc.so.6 => /lib/libc.so.6 (0x..)`, or the
/// loader's `/lib64/ld-linux-x86-64.so.2 (0x..)`.
fn library(line: &str) -> Option<&str> {
    let file = line.split_once("=>").map_or(line, |(_, file)| file).trim();
    file.split_whitespace()
        .next()
        .filter(|file| file.starts_with('/'))
}

/// The files to load for a module, in order; none if it is built in.
fn dependencies(kernel: &Kernel, module: &str) -> Result<Vec<PathBuf>> {
    let insmods = Command::new("modprobe")
        .arg("--dirname")
        .arg(&kernel.directory)
        .args(["--set-version", &kernel.release, "--show-depends", module])
        .run()
        .with_context(|| format!("kernel {} has no module {module}", kernel.release))?;
    let files = insmods
        .lines()
        .filter_map(|line| line.strip_prefix("insmod "));
    Ok(files.map(|file| PathBuf::from(file.trim())).collect())
}

fn read_module(file: &Path) -> Result<Vec<u8>> {
    let unpacker = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(file).with_context(|| format!("cannot read {}", file.display())),
    };
    let output = std::process::Command::new(unpacker)
        .args(["--decompress", "--stdout"])
        .arg(file)
        .output()
        .with_context(|| format!("cannot run {unpacker}"))?;
    ensure!(
        output.status.success(),
        "{unpacker} cannot unpack {}",
        file.display()
    );
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn libraries_are_found_in_what_ldd_says() {
        let said = "\tlinux-vdso.so.1 (0x00007ffc)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f41)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f41)\n\
                    \tlibgone.so => not found\n";
        let found: Vec<_> = said.lines().filter_map(library).collect();
        assert_eq!(
            found,
            [
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
    }

    #[test]
    fn the_archive_has_directories_before_what_is_in_them() {
        let mut initramfs = Initramfs::default();
        initramfs.file("/init", 0o755, b"#!/bin/sh\n".to_vec());
        initramfs.file("/etc/deep/file", 0o640, vec![7; 5]);
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("initramfs");
        initramfs.write(&file).unwrap();

        let mut archive = fs::File::open(&file).unwrap();
        let mut entries = Vec::new();
        loop {
            let mut reader = newc::Reader::new(archive).unwrap();
            let entry = reader.entry();
            if entry.is_trailer() {
                break;
            }
            let (name, mode) = (entry.name().to_owned(), entry.mode());
            let mut contents = Vec::new();
            reader.read_to_end(&mut contents).unwrap();
            entries.push((name, mode, contents));
            archive = reader.finish().unwrap();
        }
        let entry = |name: &str, mode, contents: &[u8]| (name.to_owned(), mode, contents.to_vec());
        assert_eq!(
            entries,
            [
                entry("etc", 0o040_755, b""),
                entry("etc/deep", 0o040_755, b""),
                entry("etc/deep/file", 0o100_640, &[7; 5]),
                entry("init", 0o100_755, b"#!/bin/sh\n"),
            ]
        );
    }
}
