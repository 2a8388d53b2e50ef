//! Answers Prometheus' scrapes: HTTP, which is `hyper`'s, for one path. What there is to say is
//! [`super`]'s. Whoever reaches the address is answered; so few at once, and for so long, that they
//! are no burden.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::TEXT_FORMAT;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::{JoinHandle, JoinSet, spawn, spawn_blocking},
    time::{sleep, timeout},
};

use crate::{host::sockets, notice::warn};

/// Where scrapers look.
const PATH: &str = "/metrics";
/// Connections at once.
const MOST: usize = 16;
/// How long a scraper may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection may last.
const LONGEST: Duration = Duration::from_mins(1);
/// How long to rest when the host has no descriptor or memory left.
const REST: Duration = Duration::from_millis(100);

/// Makes the text, on a thread of its own: many sessions take a while to count.
pub type Source = Arc<dyn Fn() -> Result<String> + Send + Sync>;

/// Where scrapers are answered.
#[derive(Debug)]
pub struct Scrapes {
    listener: TcpListener,
}

impl Scrapes {
    /// Listens, so that connections wait until they are served. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the address is not the host's, or a program has it, which is named.
    pub fn listen(address: SocketAddr) -> Result<Self> {
        let listener = std::net::TcpListener::bind(address)
            .map_err(|error| match sockets::listener_on(address) {
                Some(owner) => anyhow!("{owner} listens there"),
                None => error.into(),
            })
            .with_context(|| {
                format!("cannot answer scrapes on {address}: choose another address or port")
            })?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        Ok(Self { listener })
    }

    /// Answers until it is dropped.
    pub async fn serve(self, source: Source) {
        let turns = Arc::new(Semaphore::new(1));
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if connections.len() < MOST => {
                    match accepted {
                        Ok((stream, _)) => {
                            let talk = talk(stream, source.clone(), turns.clone());
                            connections.spawn(timeout(LONGEST, talk));
                        }
                        Err(_) => sleep(REST).await,
                    }
                }
                Some(_) = connections.join_next() => {}
            }
        }
    }
}

/// Scrapers that are answered beside other work.
#[derive(Debug)]
pub struct Answering {
    task: JoinHandle<()>,
}

impl Answering {
    #[must_use]
    pub fn begin(scrapes: Scrapes, source: Source) -> Self {
        Self {
            task: spawn(scrapes.serve(source)),
        }
    }

    /// Ends it. The address is free then.
    pub async fn end(mut self) {
        self.task.abort();
        // That it was aborted is no news.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn talk(stream: TcpStream, source: Source, turns: Arc<Semaphore>) {
    let service = service_fn(move |request| answer(request, source.clone(), turns.clone()));
    // Who hangs up has what it wanted.
    let _ = http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer(
    request: Request<Incoming>,
    source: Source,
    turns: Arc<Semaphore>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if ![Method::GET, Method::HEAD].contains(request.method()) || request.uri().path() != PATH {
        let text = format!("the metrics are at {PATH}\n");
        return Ok(response(StatusCode::NOT_FOUND, text));
    }
    // One after the other: the tables are the same for all.
    let turn = turns.acquire().await;
    let text = spawn_blocking(move || source())
        .await
        .unwrap_or_else(|error| Err(error.into()));
    drop(turn);
    Ok(match text {
        Ok(text) => {
            let mut response = response(StatusCode::OK, text);
            let format = HeaderValue::from_static(TEXT_FORMAT);
            response.headers_mut().insert(CONTENT_TYPE, format);
            response
        }
        // An instance that is down now may be up at the next scrape.
        Err(error) => {
            warn(&format!("{error:#}"));
            response(StatusCode::SERVICE_UNAVAILABLE, format!("{error:#}\n"))
        }
    })
}

fn response(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
}
