//! Takes recorded changes back, the last one first, and forgets them. What cannot be reverted stays
//! in the record, and keeps nothing else from being reverted.

use anyhow::{Result, anyhow};

use super::{Change, Claim, Host, Journal, Reverted, file::Entry};

/// The state of a [`Journal`] at one time.
#[derive(Debug)]
pub struct Mark {
    changes: usize,
    claims: Vec<Claim>,
}

impl Journal {
    /// Reverts what an earlier process of this instance changed and this one does not want.
    ///
    /// # Errors
    ///
    /// As [`Self::revert_from`].
    pub async fn revert_unwanted(&mut self, host: &impl Host) -> Result<Vec<String>> {
        self.revert_where(|_, entry| !entry.wanted, host).await
    }

    /// What the record says now, to return to.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark {
            changes: self.record.changes.len(),
            claims: self.record.claims.clone(),
        }
    }

    /// Reverts the changes that were recorded after `mark` was taken, and claims what was claimed
    /// then.
    ///
    /// # Errors
    ///
    /// As [`Self::revert_from`].
    pub async fn return_to(&mut self, mark: Mark, host: &impl Host) -> Result<Vec<String>> {
        self.record.claims = mark.claims;
        self.revert_from(mark.changes, host).await
    }

    /// Reverts the changes from the one at `position` to the last, last one first, and forgets them.
    /// Returns what was left alone, and why. With position 0 the record is empty afterwards.
    ///
    /// # Errors
    ///
    /// When some changes could not be reverted: they stay in the record, and all others are reverted
    /// all the same.
    pub async fn revert_from(&mut self, position: usize, host: &impl Host) -> Result<Vec<String>> {
        self.revert_where(|found, _| found >= position, host).await
    }

    /// Reverts the changes that are selected, and forgets them.
    ///
    /// # Errors
    ///
    /// As [`Self::revert_from`].
    pub async fn revert_matching(
        &mut self,
        selected: impl Fn(&Change) -> bool,
        host: &impl Host,
    ) -> Result<Vec<String>> {
        if !self.changes().any(&selected) {
            return Ok(Vec::new());
        }
        self.revert_where(|_, entry| selected(&entry.change), host)
            .await
    }

    /// Forgets the changes that are selected: they stay as they are.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn forget_matching(&mut self, selected: impl Fn(&Change) -> bool) -> Result<()> {
        self.record.changes.retain(|entry| !selected(&entry.change));
        self.save()
    }

    /// Forgets the changes that were made in a network namespace which is gone.
    pub fn forget_namespace(&mut self) {
        self.record
            .changes
            .retain(|entry| !entry.change.in_network_namespace());
    }

    async fn revert_where(
        &mut self,
        selected: impl Fn(usize, &Entry) -> bool,
        host: &impl Host,
    ) -> Result<Vec<String>> {
        let (mut kept, mut left_alone, mut failures) = (Vec::new(), Vec::new(), Vec::new());
        for (position, entry) in self.record.changes.drain(..).enumerate().rev() {
            if !selected(position, &entry) {
                kept.push(entry);
                continue;
            }
            match host.revert(&entry.change).await {
                Ok(Reverted::Done | Reverted::NotThere) => {}
                Ok(Reverted::LeftAlone(reason)) => left_alone.push(reason),
                Err(error) => {
                    failures.push(format!("{error:#}"));
                    kept.push(entry);
                }
            }
        }
        kept.reverse();
        self.record.changes = kept;
        self.save()?;
        if failures.is_empty() {
            Ok(left_alone)
        } else {
            Err(anyhow!(failures.join("; ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{
        super::{
            Role,
            fake::{Scratch, forwarding, make},
        },
        *,
    };
    use crate::host::{netlink::Device, sysctl::Sysctl};

    #[tokio::test]
    async fn reverts_in_reverse_order_and_forgets() {
        let scratch = Scratch::new();
        let (mut journal, host) = (scratch.journal(), scratch.host());
        make(&mut journal, forwarding("a", "0", "1"), &host).await;
        make(&mut journal, forwarding("b", "0", "1"), &host).await;
        let mut journal = scratch.reload();
        assert_eq!(
            journal.revert_from(0, &host).await.unwrap(),
            Vec::<String>::new()
        );
        assert_eq!(
            *host.log.borrow(),
            ["net.ipv4.conf.b.forwarding", "net.ipv4.conf.a.forwarding"]
        );
        assert_eq!(scratch.reload().changes().len(), 0);
    }

    #[tokio::test]
    async fn the_value_from_before_the_first_run_comes_back_after_the_second() {
        let scratch = Scratch::new();
        let host = scratch.host();
        make(&mut scratch.journal(), forwarding("a", "0", "1"), &host).await;
        let mut journal = scratch.reload();
        make(&mut journal, forwarding("a", "1", "2"), &host).await;
        assert_eq!(journal.changes().len(), 1);
        journal.revert_from(0, &host).await.unwrap();
        assert_eq!(host.value(&Sysctl::forwarding("a")).as_deref(), Some("0"));
    }

    #[tokio::test]
    async fn only_what_the_second_run_does_not_want_is_reverted() {
        let scratch = Scratch::new();
        let (mut journal, host) = (scratch.journal(), scratch.host());
        make(&mut journal, forwarding("a", "0", "1"), &host).await;
        make(&mut journal, forwarding("b", "0", "1"), &host).await;
        let mut journal = scratch.reload();
        journal.keep(&forwarding("b", "0", "1"));
        make(&mut journal, forwarding("c", "0", "1"), &host).await;
        journal.revert_unwanted(&host).await.unwrap();
        assert_eq!(*host.log.borrow(), ["net.ipv4.conf.a.forwarding"]);
        let left: Vec<_> = scratch.reload().changes().cloned().collect();
        assert_eq!(left, [forwarding("b", "0", "1"), forwarding("c", "0", "1")]);
    }

    #[tokio::test]
    async fn a_failed_start_leaves_what_an_earlier_one_recorded() {
        let scratch = Scratch::new();
        let (mut journal, host) = (scratch.journal(), scratch.host());
        make(&mut journal, forwarding("a", "0", "1"), &host).await;
        let claim = |name: &str| Claim {
            device: Device {
                name: name.to_owned(),
                index: 3,
            },
            role: Role::Inside,
        };
        journal.set_claims(vec![claim("a")]).unwrap();
        let before = fs::read_to_string(&host.path).unwrap();
        let mark = journal.mark();
        journal.set_claims(vec![claim("b")]).unwrap();
        make(&mut journal, forwarding("b", "0", "1"), &host).await;
        journal.return_to(mark, &host).await.unwrap();
        assert_eq!(host.value(&Sysctl::forwarding("b")).as_deref(), Some("0"));
        assert_eq!(fs::read_to_string(&host.path).unwrap(), before);
    }

    #[tokio::test]
    async fn a_failure_stays_in_the_record_and_does_not_stop_the_rest() {
        let scratch = Scratch::new();
        let mut host = scratch.host();
        let mut journal = scratch.journal();
        for device in ["a", "b", "c"] {
            make(&mut journal, forwarding(device, "0", "1"), &host).await;
        }
        host.set(&Sysctl::forwarding("a"), "2");
        host.broken = Some(Sysctl::forwarding("b"));
        let error = journal.revert_from(0, &host).await.unwrap_err().to_string();
        assert_eq!(error, "cannot write net.ipv4.conf.b.forwarding");
        assert_eq!(
            scratch.reload().changes().cloned().collect::<Vec<_>>(),
            [forwarding("b", "0", "1")]
        );
        host.broken = None;
        assert!(scratch.reload().revert_from(0, &host).await.is_ok());
    }

    #[tokio::test]
    async fn says_what_somebody_else_changed_since() {
        let scratch = Scratch::new();
        let (mut journal, host) = (scratch.journal(), scratch.host());
        make(&mut journal, forwarding("a", "0", "1"), &host).await;
        host.set(&Sysctl::forwarding("a"), "2");
        let notes = journal.revert_from(0, &host).await.unwrap();
        assert_eq!(notes, ["net.ipv4.conf.a.forwarding was changed"]);
        assert_eq!(host.value(&Sysctl::forwarding("a")).as_deref(), Some("2"));
    }
}
