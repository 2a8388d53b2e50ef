//! `tapnat metrics`: an instance for Prometheus.

use std::{io, net::SocketAddr};

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use tiny_http::{Header, Method, Request, Response, Server};

use super::{Instance, print};
use crate::{activity, daemon::warn, metrics};

/// Where scrapers look.
const PATH: &str = "/metrics";
/// <https://github.com/prometheus/OpenMetrics>
const FORMAT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug, Args)]
pub struct Arguments {
    /// Answer HTTP requests for /metrics here instead, such as 127.0.0.1:9477
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,

    #[command(flatten)]
    instance: Instance,
}

impl Arguments {
    pub fn execute(self) -> Result<()> {
        let Some(address) = self.listen else {
            return print::text(&self.text()?);
        };
        let server = Server::http(address)
            .map_err(|error| anyhow!(error))
            .with_context(|| format!("cannot listen on {address}: choose another --listen"))?;
        for request in server.incoming_requests() {
            // Who hangs up has what it wanted.
            let _ = self.answer(request);
        }
        Ok(())
    }

    fn answer(&self, request: Request) -> io::Result<()> {
        let path = request.url().split('?').next();
        if *request.method() != Method::Get || path != Some(PATH) {
            let answer = Response::from_string("the metrics are at /metrics\n");
            return request.respond(answer.with_status_code(404));
        }
        match self.text() {
            Ok(text) => {
                let mut answer = Response::from_string(text);
                if let Ok(format) = Header::from_bytes("Content-Type", FORMAT) {
                    answer.add_header(format);
                }
                request.respond(answer)
            }
            // An instance that is down now may be up at the next scrape.
            Err(error) => {
                warn(&format!("{error:#}"));
                let answer = Response::from_string(format!("{error:#}\n"));
                request.respond(answer.with_status_code(503))
            }
        }
    }

    fn text(&self) -> Result<String> {
        let tables = self.instance.tables()?;
        metrics::text(activity::status(&self.instance.name, &tables)?)
    }
}
