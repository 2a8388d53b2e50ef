//! How commands change a running instance: a socket beside its lock, one request and one answer a
//! connection, each a line of JSON. Only root gets there. While no process runs, a command does the
//! same by itself, under the instance's lock. What a request means is other modules' business.

use std::{io, os::unix::net::UnixStream as BlockingStream, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use tapnat_common::net::Be128;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    changes::RealHost,
    datapath::Pins,
    files,
    forwards::Forward,
    host::{
        namespace::NetworkNamespace,
        netlink::{Device, Netlink},
        sockets::name_owner,
    },
    instance::{InstanceName, Lock},
    journal::{Journal, Role},
    pool,
    statics::{self, Added, Selector},
    sweep::Remover,
    tables::{BothTables, PinnedTables},
};

const SOCKET: &str = "control";
/// More than any request needs.
const LONGEST_REQUEST: u64 = 64 * 1024;
/// How long a command may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the daemon may take to do it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Requests that wait for the daemon.
const QUEUE: usize = 16;

/// What a command asks of an instance.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub enum Request {
    AddForward(Forward),
    RemoveForward(Selector),
    /// Only a process can do that.
    Reload,
}

/// What came of it: what the operator should know, one line each, or why nothing was done.
type Answer = Result<Vec<String>, String>;

/// A request that waits for its answer.
#[derive(Debug)]
pub struct Pending {
    pub request: Request,
    answer: oneshot::Sender<Answer>,
}

impl Pending {
    /// Answers it.
    pub fn answer(self, result: Result<Vec<String>>) {
        // Whoever asked may have gone.
        let _ = self
            .answer
            .send(result.map_err(|error| format!("{error:#}")));
    }
}

fn socket(instance: &InstanceName) -> PathBuf {
    instance.run_directory().join(SOCKET)
}

/// The daemon's end.
#[derive(Debug)]
pub struct Control {
    requests: mpsc::Receiver<Pending>,
}

impl Control {
    /// Starts to listen for requests to an instance whose lock the caller holds. Must be called
    /// within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the socket cannot be made.
    pub fn listen(instance: &InstanceName) -> Result<Self> {
        remove(instance)?;
        let path = socket(instance);
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("cannot listen on {}", path.display()))?;
        let (sender, requests) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let sender = sender.clone();
                        tokio::spawn(async move {
                            // Whoever asked sees that there is no answer.
                            let _ =
                                timeout(REQUEST_TIMEOUT + ANSWER_TIMEOUT, pass_on(stream, sender))
                                    .await;
                        });
                    }
                    // Out of descriptors, or the client is gone again.
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        });
        Ok(Self { requests })
    }

    /// Waits for the next request.
    pub async fn next(&mut self) -> Pending {
        match self.requests.recv().await {
            Some(pending) => pending,
            None => std::future::pending().await,
        }
    }
}

async fn pass_on(mut stream: UnixStream, sender: mpsc::Sender<Pending>) -> Result<()> {
    let mut line = String::new();
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader.take(LONGEST_REQUEST));
    timeout(REQUEST_TIMEOUT, reader.read_line(&mut line)).await??;
    let answer: Answer = match serde_json::from_str(&line) {
        Ok(request) => {
            let (answer, answered) = oneshot::channel();
            sender.send(Pending { request, answer }).await?;
            answered.await?
        }
        Err(_) => Err("it runs another version of tapnat: use that version's command".to_owned()),
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    writer.write_all(&text).await?;
    Ok(())
}

/// Whether a process listens for requests to the instance: it runs, and is not about to end.
#[must_use]
pub fn is_listening(instance: &InstanceName) -> bool {
    BlockingStream::connect(socket(instance)).is_ok()
}

/// Removes the socket that a daemon left.
///
/// # Errors
///
/// When it is there and cannot be removed.
pub fn remove(instance: &InstanceName) -> Result<()> {
    files::remove(&socket(instance)).map(drop)
}

/// Has the instance do it, and returns what it says: its process if one runs, else this one does it.
///
/// # Errors
///
/// When the instance refuses, does not answer, or is not there.
pub async fn ask(
    instance: &InstanceName,
    request: &Request,
    open: impl FnOnce() -> Result<BothTables>,
) -> Result<Vec<String>> {
    let failed = |error: io::Error| {
        anyhow!("the tapnat instance '{instance}' does not answer ({error}): see what it says")
    };
    match connect(instance) {
        Ok(stream) => {
            let exchanged = timeout(ANSWER_TIMEOUT, exchange(stream, request)).await;
            let line = exchanged
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                .map_err(failed)?;
            let answer: Answer = serde_json::from_str(&line).with_context(|| {
                format!("the tapnat instance '{instance}' does not answer sensibly: '{line}'")
            })?;
            // It has given up the privilege to look into other processes.
            return answer.map_err(|error| anyhow!(name_owner(&error)));
        }
        Err(error)
            if [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused]
                .contains(&error.kind()) => {}
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            bail!("permission denied to reach the tapnat instance '{instance}': run as root")
        }
        Err(error) => return Err(failed(error)),
    }
    let tables = open()?;
    let _lock = match Lock::instance(instance)? {
        Ok(lock) => lock,
        Err(holder) => {
            bail!("the tapnat instance '{instance}'{holder} is starting or ending: try again")
        }
    };
    let Some(journal) = Journal::load(instance)? else {
        bail!(
            "the tapnat instance '{instance}' has lost its record of changes: end it (`tapnat down \
             --instance {instance}`)"
        );
    };
    if journal.network_namespace() != NetworkNamespace::current()? {
        bail!(
            "the tapnat instance '{instance}' belongs to another network namespace: say this there \
             (`nsenter --net=.. tapnat ..`)"
        );
    }
    perform_alone(instance, tables, journal, request).await
}

/// Does it in place of the process that does not run, under the instance's lock.
async fn perform_alone(
    instance: &InstanceName,
    mut tables: BothTables,
    mut journal: Journal,
    request: &Request,
) -> Result<Vec<String>> {
    let pins = Pins::find(instance)?;
    let remover = pins.remover()?;
    let BothTables { ipv4, ipv6, .. } = &mut tables;
    let done = perform(ipv4, ipv6.as_mut(), &remover, request)?;
    let claims = journal.claims().iter();
    let uplinks = claims.filter(|claim| claim.role == Role::Uplink);
    let uplinks: Vec<_> = uplinks.map(|claim| claim.device.clone()).collect();
    let host = RealHost::new(instance.clone(), Netlink::open()?);
    let settled = settle_alone(ipv4, ipv6.as_ref(), &uplinks, &host, &mut journal).await;
    match (settled, &done.added) {
        (Ok(notes), _) => Ok([done.notes, notes].concat()),
        (Err(error), None) => Err(error),
        (Err(error), Some(added)) => {
            statics::take_back(ipv4, ipv6.as_mut(), &remover, added)?;
            // What fails again stays in the journal.
            let _ = settle_alone(ipv4, ipv6.as_ref(), &uplinks, &host, &mut journal).await;
            Err(error)
        }
    }
}

/// Puts the addresses of static mappings on the uplinks.
async fn settle_alone(
    ipv4: &PinnedTables,
    ipv6: Option<&PinnedTables<Be128>>,
    uplinks: &[Device],
    host: &RealHost,
    journal: &mut Journal,
) -> Result<Vec<String>> {
    // Of these nobody here can tell whether the operator gave them or the uplink had them.
    let mut kept = ipv4.outside_addresses()?;
    let mut wanted = pool::of_statics(ipv4)?;
    if let Some(ipv6) = ipv6 {
        kept.extend(ipv6.outside_addresses()?);
        wanted.extend(pool::of_statics(ipv6)?);
    }
    let mut notes = Vec::new();
    for uplink in uplinks {
        notes.extend(pool::settle(&wanted, &kept, uplink, host, journal).await?);
    }
    Ok(notes)
}

/// What [`perform`] did.
#[derive(Debug, Default)]
pub struct Done {
    /// What the operator should know, one line each.
    pub notes: Vec<String>,
    /// To be taken back if what belongs to it cannot be done.
    pub added: Option<Added>,
}

/// Does what needs the tables alone.
///
/// # Errors
///
/// When it cannot be done, in which case nothing is changed.
pub fn perform(
    ipv4: &mut PinnedTables,
    ipv6: Option<&mut PinnedTables<Be128>>,
    remover: &impl Remover,
    request: &Request,
) -> Result<Done> {
    match request {
        Request::AddForward(forward) => {
            let added = statics::add(ipv4, ipv6, remover, forward)?;
            let notes = added
                .is_empty()
                .then(|| format!("{} is there already", forward.name()));
            Ok(Done {
                notes: notes.into_iter().collect(),
                added: Some(added),
            })
        }
        Request::RemoveForward(selector) => {
            statics::remove(ipv4, ipv6, remover, selector)?;
            Ok(Done::default())
        }
        Request::Reload => bail!(
            "no process of the instance runs, which could read its file again: start it with \
             `tapnat run --config`"
        ),
    }
}

fn connect(instance: &InstanceName) -> io::Result<UnixStream> {
    let stream = BlockingStream::connect(socket(instance))?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

async fn exchange(mut stream: UnixStream, request: &Request) -> io::Result<String> {
    let mut text = serde_json::to_vec(request)?;
    text.push(b'\n');
    stream.write_all(&text).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    if answer.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(answer)
}
