//! `tapnat metrics`: an instance for Prometheus.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Result;
use clap::Args;

use super::{Instance, print};
use crate::{
    config::parse_endpoint,
    metrics::{self, scrapes::Scrapes},
};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Answer HTTP requests for /metrics here instead, such as 127.0.0.1:9477, also while the instance
    /// is down
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = parse_endpoint)]
    listen: Option<SocketAddr>,

    #[command(flatten)]
    instance: Instance,
}

impl Arguments {
    pub async fn execute(self) -> Result<()> {
        let instance = self.instance;
        let text = move || metrics::text(&instance.name, &instance.tables()?);
        match self.listen {
            None => print::text(&text()?),
            Some(address) => {
                Scrapes::listen(address)?.serve(Arc::new(text)).await;
                Ok(())
            }
        }
    }
}
