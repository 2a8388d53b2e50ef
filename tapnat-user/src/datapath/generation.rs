//! Generations of programs: those of one build with the same constants. They are pinned, so that the
//! next process of the same build attaches what the kernel has verified already. Owns a directory of
//! the instance's pins for each: its programs, and the tables that only these have in common.
//!
//! A generation has its name, which says what it is, from when it is whole.

use std::{
    ffi::OsStr,
    fs,
    hash::{DefaultHasher, Hash, Hasher as _},
    iter,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{MapInfo, ProgramArray},
    programs::{Program, ProgramFd, SchedClassifier},
};
use tapnat_common::abi::{ABI_VERSION, globals, maps, programs, stages};

use super::{explain_load, explain_refusal};
use crate::files::{self, make_directory, unused_in};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tapnat"));
/// Which one that is.
const OBJECT_IDENTITY: &str = env!("TAPNAT_OBJECT");

/// The name of a generation that is not whole yet.
const UNFINISHED: &str = "unfinished";
/// The directories in a generation's.
const PROGRAMS: &str = "programs";
const TABLES: &str = "maps";

/// What is fixed when programs are loaded: values that the verifier reckons with, and the sizes of
/// tables.
#[derive(Clone, Debug, Hash)]
pub(super) struct Constants {
    pub namespace: u64,
    pub count: u8,
    pub log: u8,
    pub ipv6_checksums: u8,
    /// Whether there are programs for IPv6, and room in its tables.
    pub ipv6: bool,
    /// Whether there are programs for NAT64.
    pub nat64: bool,
    /// Whether prefixes of IPv6 are translated.
    pub prefixes: bool,
    pub verbose: u8,
    pub log_bytes: u32,
    pub halves: u32,
    pub mappings: u32,
    pub permissions: u32,
}

impl Constants {
    /// The programs that others go on to, with their places in the table.
    fn stages(&self) -> impl Iterator<Item = (u32, &'static str)> {
        let ipv6 = if self.ipv6 { &stages::IPV6[..] } else { &[] };
        let nat64 = if self.nat64 { &stages::NAT64[..] } else { &[] };
        let prefixes = if self.prefixes {
            &stages::PREFIXES[..]
        } else {
            &[]
        };
        let ipv6 = ipv6.iter().chain(nat64).chain(prefixes);
        stages::IPV4.iter().chain(ipv6).copied()
    }

    /// How the names of generations begin whose programs were made of this.
    fn identity(&self) -> String {
        let mut hasher = DefaultHasher::new();
        OBJECT_IDENTITY.hash(&mut hasher);
        ABI_VERSION.hash(&mut hasher);
        self.hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }
}

/// A whole generation.
#[derive(Debug)]
pub(super) struct Generation {
    constants: Constants,
    /// Of the tables that all generations have in common.
    tables: PathBuf,
    directory: PathBuf,
}

impl Generation {
    /// The one among these `generations` that is of this build and these constants, and works on the
    /// pinned `tables`, if there is one.
    pub fn find(generations: &Path, tables: &Path, constants: &Constants) -> Option<Self> {
        let identity = constants.identity();
        fs::read_dir(generations)
            .ok()?
            .filter_map(Result::ok)
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&identity))
            .map(|entry| Self {
                constants: constants.clone(),
                tables: tables.to_owned(),
                directory: entry.path(),
            })
            .find(|generation| generation.works_on_tables().is_ok_and(|works| works))
    }

    /// Loads a new one into `generations`, and creates the `tables` that are not there. It has what
    /// every generation has, and the programs that are `wanted` besides.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn load(
        generations: &Path,
        tables: &Path,
        constants: Constants,
        wanted: &[&'static str],
    ) -> Result<Self> {
        let unfinished = generations.join(UNFINISHED);
        files::remove(&unfinished)?;
        let name = constants.identity();
        let mut generation = Self {
            constants,
            tables: tables.to_owned(),
            directory: unfinished,
        };
        for directory in [PROGRAMS, TABLES] {
            make_directory(&generation.directory.join(directory))?;
        }
        let mut object = generation.open_object()?;
        for (name, table) in object.maps() {
            // A name with a dot is of the compiler's sections, and cannot be pinned.
            let is_own = name == maps::STAGES || maps::all().all(|shared| shared != name);
            if is_own && !name.contains('.') {
                let path = generation.directory.join(TABLES).join(name);
                table
                    .pin(&path)
                    .with_context(|| format!("cannot pin {}", path.display()))?;
            }
        }
        // The stages take longest, and so come first.
        let stages: Vec<_> = generation.constants.stages().collect();
        let names = stages.iter().map(|(_, name)| *name);
        let names = names.chain([programs::SWEEP]);
        let names: Vec<_> = names.chain(wanted.iter().copied()).collect();
        generation.load_from(&mut object, &names)?;
        fill_stages(&mut object, &stages)?;

        // What is attached may be of another one of the same name, whose tables somebody replaced.
        let whole = unused_in(generations, &format!("{name}-"))?;
        fs::rename(&generation.directory, &whole)
            .with_context(|| format!("cannot make {}", whole.display()))?;
        generation.directory = whole;
        Ok(generation)
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where a program is pinned, if it is loaded.
    pub fn program(&self, name: &str) -> PathBuf {
        program_in(&self.directory, name)
    }

    /// Loads those of the programs that are not loaded yet.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn add(&self, wanted: &[&'static str]) -> Result<()> {
        let missing = wanted.iter().filter(|name| !self.program(name).exists());
        let missing: Vec<_> = missing.copied().collect();
        if missing.is_empty() {
            return Ok(());
        }
        self.load_from(&mut self.open_object()?, &missing)
    }

    /// The object with its tables, and with no program loaded.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, as it does for want of memory.
    pub fn open_object(&self) -> Result<Ebpf> {
        let Constants {
            namespace,
            count,
            log,
            ipv6_checksums,
            ipv6,
            nat64,
            prefixes,
            verbose,
            log_bytes,
            halves,
            mappings,
            permissions,
        } = &self.constants;
        let (nat64, prefixes) = (u8::from(*nat64), u8::from(*prefixes));
        let own = files::list(&self.directory.join(TABLES))?;
        let mut loader = EbpfLoader::new();
        loader
            .override_global(globals::NETNS_COOKIE, namespace, true)
            .override_global(globals::COUNT_TRAFFIC, count, true)
            .override_global(globals::NAT_LOG, log, true)
            .override_global(aya_log::LEVEL, verbose, true)
            .override_global(globals::IPV6_CHECKSUMS, ipv6_checksums, true)
            .override_global(globals::NAT64, &nat64, true)
            .override_global(globals::PREFIXES, &prefixes, true)
            .map_max_entries(maps::NAT_LOG, *log_bytes);
        for (names, has_room) in [(&maps::IPV4, true), (&maps::IPV6, *ipv6)] {
            if !has_room {
                for name in names.all() {
                    loader.map_max_entries(name, 1);
                }
                continue;
            }
            loader
                .map_max_entries(names.sessions, *halves)
                .map_max_entries(names.mappings, *mappings)
                .map_max_entries(names.inside, mappings + maps::MAPPING_LOCKS)
                .map_max_entries(names.permissions, *permissions)
                .map_max_entries(names.looked_after, *halves / 2);
        }
        for name in maps::all().filter(|name| *name != maps::STAGES) {
            loader.map_pin_path(name, self.tables.join(name));
        }
        for path in &own {
            if let Some(name) = path.file_name().and_then(OsStr::to_str) {
                loader.map_pin_path(name, path);
            }
        }
        loader.load(OBJECT).map_err(explain_load)
    }

    /// Loads programs of the object and pins them.
    fn load_from(&self, object: &mut Ebpf, names: &[&str]) -> Result<()> {
        load_side_by_side(object, names)?;
        for name in names {
            let path = self.program(name);
            object
                .program_mut(name)
                .with_context(|| missing(name))?
                .pin(&path)
                .with_context(|| format!("cannot pin {}", path.display()))?;
        }
        Ok(())
    }

    /// Whether the tables that are pinned are those of its programs. The ring of the NAT log is
    /// replaced when it needs another size; the others come and go with all generations.
    fn works_on_tables(&self) -> Result<bool> {
        let mut used = Vec::new();
        for (_, name) in self.constants.stages() {
            let program = SchedClassifier::from_pin(self.program(name))?;
            used.extend(program.info()?.map_ids()?.unwrap_or_default());
        }
        let log = MapInfo::from_pin(self.tables.join(maps::NAT_LOG))?.id();
        let are_there = maps::all()
            .filter(|name| *name != maps::STAGES)
            .all(|name| self.tables.join(name).exists());
        Ok(are_there && used.contains(&log))
    }
}

fn program_in(generation: &Path, name: &str) -> PathBuf {
    generation.join(PROGRAMS).join(name)
}

/// The sweep program of a whole one among these generations.
///
/// # Errors
///
/// When there is none.
pub(super) fn sweep(generations: &Path) -> Result<SchedClassifier> {
    let found = files::list(generations)?
        .into_iter()
        .filter(|path| !path.ends_with(UNFINISHED))
        .find_map(|path| SchedClassifier::from_pin(program_in(&path, programs::SWEEP)).ok());
    found.with_context(|| format!("no program is pinned in {}", generations.display()))
}

/// The kernel empties a table of programs when no process and no pin holds it any more.
fn fill_stages(object: &mut Ebpf, stages: &[(u32, &str)]) -> Result<()> {
    let mut places = Vec::new();
    for (place, name) in stages {
        let program = object.program(name).with_context(|| missing(name))?;
        let descriptor: ProgramFd = program
            .fd()
            .with_context(|| format!("{name} is not loaded"))?
            .try_clone()
            .with_context(|| format!("cannot keep {name} open"))?;
        places.push((*place, descriptor));
    }
    let table = object
        .map_mut(maps::STAGES)
        .context("the datapath has no stages: rebuild tapnat")?;
    let mut table = ProgramArray::try_from(table)?;
    for (place, descriptor) in &places {
        table
            .set(*place, descriptor, 0)
            .context("cannot fill the table of programs")?;
    }
    Ok(())
}

fn missing(name: &str) -> String {
    format!("the datapath has no program {name}: rebuild tapnat")
}

/// Loads these programs, in this order, on all processors: nearly all of a start is the verifier's
/// work, and it takes programs side by side.
fn load_side_by_side(object: &mut Ebpf, names: &[&str]) -> Result<()> {
    let mut programs: Vec<_> = object
        .programs_mut()
        .filter_map(|(name, program)| {
            let place = names.iter().position(|wanted| *wanted == name)?;
            Some((place, name, program))
        })
        .collect();
    programs.sort_unstable_by_key(|(place, ..)| *place);
    let most = programs.len();
    let programs = Mutex::new(programs.into_iter());
    let load_next = || {
        let next = programs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .next();
        next.map(|(_, name, program)| load(name, program))
    };
    let load_all = || iter::from_fn(load_next).collect::<Result<()>>();
    thread::scope(|scope| {
        let count = thread::available_parallelism()
            .map_or(1, NonZeroUsize::get)
            .min(most);
        // Where there can be no other thread, this one does it all.
        let others: Vec<_> = (1..count)
            .map_while(|_| {
                let thread = thread::Builder::new();
                thread.spawn_scoped(scope, load_all).ok()
            })
            .collect();
        let own = load_all();
        others.into_iter().try_for_each(|other| {
            let loaded = other.join();
            loaded.map_err(|_| anyhow!("loading the programs failed: please report this"))?
        })?;
        own
    })
}

fn load(name: &str, program: &mut Program) -> Result<()> {
    match program {
        Program::SchedClassifier(program) => program.load(),
        Program::Xdp(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        _ => bail!("the program {name} is of a type that nothing is attached to: rebuild tapnat"),
    }
    .map_err(|error| explain_refusal(name, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_the_verifier_reckons_with_tells_generations_apart() {
        let one = Constants {
            namespace: 1,
            count: 0,
            log: 0,
            ipv6_checksums: 1,
            ipv6: false,
            nat64: false,
            prefixes: false,
            verbose: 0,
            log_bytes: 4096,
            halves: 200,
            mappings: 100,
            permissions: 25,
        };
        assert_eq!(one.identity(), one.clone().identity());
        let other = |change: fn(&mut Constants)| {
            let mut other = one.clone();
            change(&mut other);
            other.identity()
        };
        let others = [
            other(|it| it.namespace = 2),
            other(|it| it.count = 1),
            other(|it| it.log = 1),
            other(|it| it.ipv6_checksums = 0),
            other(|it| it.ipv6 = true),
            other(|it| it.nat64 = true),
            other(|it| it.prefixes = true),
            other(|it| it.verbose = 4),
            other(|it| it.log_bytes = 8192),
            other(|it| it.halves = 100),
            other(|it| it.mappings = 200),
            other(|it| it.permissions = 50),
        ];
        for (place, identity) in others.iter().enumerate() {
            assert_ne!(*identity, one.identity());
            assert!(!others[..place].contains(identity));
        }
    }
}
