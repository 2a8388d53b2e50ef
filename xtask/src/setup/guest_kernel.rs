//! Kernels for QEMU guests: Debian's, downloaded and unpacked but never installed. Owns the
//! directories `target/guest/kernel` and `target/guest/kernels/SUITE`, which hold `vmlinux` (the
//! uncompressed kernel, which starts faster than the compressed one), `release` (its version, as
//! `uname -r` prints it in the guest) and `lib/modules/RELEASE` with `modules.dep`.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use super::apt::Apt;
use crate::command;

/// The package that depends on the newest kernel of a Debian release. QEMU's guests are x86-64, and
/// so are the machines that they run on.
const META_PACKAGE: &str = "linux-image-amd64";
/// What the names of kernels begin with; their releases follow.
const IMAGE: &str = "linux-image-";

/// Whether the kernel is there.
pub fn is_present() -> bool {
    directory().join("vmlinux").is_file()
}

/// Downloads and unpacks that of the machine's release.
///
/// # Errors
/// When it cannot be downloaded, is packed in a way unknown here, or the disk is full.
pub fn install(apt: &mut Apt) -> Result<()> {
    install_in(&directory(), apt)
}

/// The directory of the kernel of a suite of Debian's archive, which is downloaded and unpacked if it
/// is not there.
///
/// # Errors
/// As [`install`].
pub fn of_suite(suite: &str) -> Result<PathBuf> {
    let directory = command::target_directory()
        .join("guest/kernels")
        .join(suite);
    if !directory.join("vmlinux").is_file() {
        install_in(&directory, &mut Apt::of_suite(suite)?)
            .with_context(|| format!("cannot get the kernel of {suite}"))?;
    }
    Ok(directory)
}

fn install_in(directory: &Path, apt: &mut Apt) -> Result<()> {
    let partial = directory.with_extension("partial");
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
    unpack(apt, &partial)?;
    fs::rename(&partial, directory).with_context(|| format!("cannot rename {}", partial.display()))
}

/// Where the kernel lies once it is there.
pub fn directory() -> PathBuf {
    command::target_directory().join("guest/kernel")
}

fn unpack(apt: &mut Apt, directory: &Path) -> Result<()> {
    let package = apt.dependencies(META_PACKAGE)?;
    let package = package
        .iter()
        .find(|name| name.starts_with(IMAGE))
        .with_context(|| format!("{META_PACKAGE} depends on no kernel"))?;
    let release = package.trim_start_matches(IMAGE);
    // Until Linux 6.12 the image is all; later it consists of others of the same release.
    let parts = apt.dependencies(package)?;
    let parts = parts.iter().filter(|name| name.ends_with(release));
    for package in parts.chain([package]) {
        apt.download(package, directory)?;
        let archive = only_entry(directory, package)?;
        command::output(
            Command::new("dpkg-deb")
                .arg("--extract")
                .arg(&archive)
                .arg(directory),
        )?;
        fs::remove_file(&archive)
            .with_context(|| format!("cannot remove {}", archive.display()))?;
    }
    if !directory.join("lib").exists() {
        symlink("usr/lib", directory.join("lib"))
            .with_context(|| format!("cannot make {}", directory.join("lib").display()))?;
    }

    let modules = directory.join("lib/modules").join(release);
    let places = [
        directory.join("boot").join(format!("vmlinuz-{release}")),
        modules.join("vmlinuz"),
    ];
    let image = places
        .iter()
        .find(|place| place.is_file())
        .with_context(|| format!("there is no kernel in {package}"))?;
    let depmod = command::find_program("depmod").context("there is no depmod (package kmod)")?;
    command::output(
        Command::new(depmod)
            .arg("--basedir")
            .arg(directory)
            .arg(release),
    )?;
    fs::write(directory.join("release"), release)
        .with_context(|| format!("cannot write {}", directory.join("release").display()))?;

    let image = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    extract_vmlinux(&image, directory)
}

/// The entry of a directory whose name begins so.
///
/// # Errors
/// When there is none.
pub fn only_entry(directory: &Path, beginning: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(directory)
        .with_context(|| format!("cannot list {}", directory.display()))?
        .collect::<Result<Vec<_>, _>>()?;
    entries
        .into_iter()
        .map(|entry| entry.path())
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(beginning))
        })
        .with_context(|| format!("there is no {beginning}* in {}", directory.display()))
}

/// Writes the `vmlinux` that is packed into a bzImage to `directory/vmlinux`.
fn extract_vmlinux(image: &[u8], directory: &Path) -> Result<()> {
    let payload = Payload::find(image).context("the kernel image is not a bzImage")?;
    let packed = directory.join("vmlinux.packed");
    fs::write(&packed, payload.packed)
        .with_context(|| format!("cannot write {}", packed.display()))?;

    let [program, arguments @ ..] = payload.unpacker()?;
    let vmlinux = directory.join("vmlinux");
    let output =
        File::create(&vmlinux).with_context(|| format!("cannot write {}", vmlinux.display()))?;
    let input = File::open(&packed).with_context(|| format!("cannot read {}", packed.display()))?;
    command::run(
        Command::new(program)
            .args(arguments)
            .stdin(Stdio::from(input))
            .stdout(output),
    )?;
    fs::remove_file(&packed).with_context(|| format!("cannot remove {}", packed.display()))?;

    let size = fs::metadata(&vmlinux)?.len();
    ensure!(
        size == u64::from(payload.unpacked_size),
        "the kernel should have {} bytes unpacked, but has {size}",
        payload.unpacked_size
    );
    Ok(())
}

/// The compressed kernel in a bzImage.
struct Payload<'a> {
    packed: &'a [u8],
    /// In bytes.
    unpacked_size: u32,
}

impl<'a> Payload<'a> {
    /// Finds it by the boot protocol's header, little-endian throughout: number of 512-byte setup
    /// sectors at 0x1f1 (0 means 4), `HdrS` at 0x202, protocol version at 0x206 (2.08 is the first
    /// to tell where the payload is), payload offset and length at 0x248 and 0x24c. The payload
    /// ends with its unpacked size.
    ///
    /// See `Documentation/arch/x86/boot.rst` of the kernel.
    fn find(image: &'a [u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?));
        let is_image = image.get(0x202..0x206)? == b"HdrS";
        let version = u16::from_le_bytes(image.get(0x206..0x208)?.try_into().ok()?);
        if !is_image || version < 0x0208 {
            return None;
        }
        let setup_sectors = match *image.get(0x1f1)? {
            0 => 4,
            sectors => usize::from(sectors),
        };
        let start = (setup_sectors + 1) * 512 + usize::try_from(word(0x248)?).ok()?;
        let end = start.checked_add(usize::try_from(word(0x24c)?).ok()?)?;
        let (packed, size) = image.get(start..end)?.split_last_chunk::<4>()?;
        Some(Self {
            packed,
            unpacked_size: u32::from_le_bytes(*size),
        })
    }

    /// The command that unpacks it from standard input to standard output.
    fn unpacker(&self) -> Result<&'static [&'static str; 2]> {
        Ok(match self.packed {
            [0xfd, b'7', b'z', b'X', b'Z', ..] => &["xz", "-dc"],
            [0x1f, 0x8b, ..] => &["gzip", "-dc"],
            [0x28, 0xb5, 0x2f, 0xfd, ..] => &["zstd", "-dc"],
            _ => bail!("the kernel is packed neither with xz nor gzip nor zstd"),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// A bzImage with nothing in it but the header's fields that count, and this payload.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend([0; 16]);
        image.extend(payload);
        image.extend(b"relocations");
        image
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut gzip = Command::new("gzip")
            .arg("-c")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        gzip.stdin.take().unwrap().write_all(content).unwrap();
        gzip.wait_with_output().unwrap().stdout
    }

    #[test]
    fn the_kernel_comes_out_as_it_was_packed() {
        let kernel = b"\x7fELF and so on";
        let mut payload = gzip(kernel);
        payload.extend(u32::try_from(kernel.len()).unwrap().to_le_bytes());
        let directory = tempfile::tempdir().unwrap();
        extract_vmlinux(&image(&payload), directory.path()).unwrap();
        assert_eq!(fs::read(directory.path().join("vmlinux")).unwrap(), kernel);
        assert!(!directory.path().join("vmlinux.packed").exists());
    }

    #[test]
    fn a_kernel_of_the_wrong_size_is_refused() {
        let mut payload = gzip(b"short");
        payload.extend(4096_u32.to_le_bytes());
        let directory = tempfile::tempdir().unwrap();
        let error = extract_vmlinux(&image(&payload), directory.path()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel should have 4096 bytes unpacked, but has 5"
        );
    }

    #[test]
    fn other_files_are_refused() {
        assert!(Payload::find(b"").is_none());
        assert!(Payload::find(&[0; 4096]).is_none());
        let mut cut = image(&[0; 64]);
        cut.truncate(1050);
        assert!(Payload::find(&cut).is_none());
    }

    #[test]
    fn unknown_packing_is_refused() {
        let image = image(b"lzop?\0\0\0\0");
        assert!(Payload::find(&image).unwrap().unpacker().is_err());
    }
}
