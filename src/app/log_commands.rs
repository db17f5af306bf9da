//! The commands that change the log, and open the file of the access log again.

use std::time::{Duration, Instant};

use tokio_util::task::AbortOnDropHandle;

use super::commands::Planned;
use super::{App, StartError};
use crate::control::command::{CommandError, Report};

impl App {
    pub(super) fn plan_log(&self, filter: Option<String>, lasts: Option<Duration>) -> Result<Planned, CommandError> {
        let log = self.environment.log_filter.as_ref();
        let log = log.ok_or_else(|| CommandError::BadFilter("this Ringway writes no log".to_owned()))?;
        if let Some(filter) = &filter {
            log.check(filter).map_err(CommandError::BadFilter)?;
        }
        let summary = match (&filter, lasts) {
            (None, _) => format!("log: {}, as at the start", log.first()),
            (Some(filter), None) => format!("log: {filter}"),
            (Some(filter), Some(lasts)) => {
                format!("log: {filter} for {}, then {}", humantime::format_duration(lasts), log.first())
            }
        };
        Ok(Planned::Log { filter, lasts, summary })
    }

    /// Changes the filter of the log. A change with a time ends by itself, and every other one replaces it.
    pub(super) fn apply_log(&mut self, filter: Option<&str>, lasts: Option<Duration>, summary: String) -> Report {
        if let Some(log) = self.environment.log_filter.clone() {
            log.set(filter);
            // Not all times can be added to a clock.
            let ends = lasts.and_then(|lasts| Instant::now().checked_add(lasts));
            self.log_changed = filter.map(|filter| (filter.to_owned(), ends));
            self.show();
            self.log_ends = lasts.filter(|_| filter.is_some()).map(|lasts| {
                AbortOnDropHandle::new(tokio::spawn(async move {
                    tokio::time::sleep(lasts).await;
                    log.set(None);
                    tracing::info!(filter = log.first(), "the log is as at the start again");
                }))
            });
        }
        Report { changes: vec![summary], ..Report::default() }
    }

    pub(super) fn plan_reopen(&self) -> Result<Planned, CommandError> {
        let log = self.config.access_log.as_ref();
        let log =
            log.ok_or_else(|| CommandError::CannotPrepare("there is no access log: set access_log".to_owned()))?;
        if !log.is_file() {
            let problem = format!("the access log is {}, which needs no rotation", log.path.display());
            return Err(CommandError::CannotPrepare(problem));
        }
        let changes = vec![format!("access log: {} is opened again", log.path.display())];
        Ok(Planned::Reopen(Report { changes, ..Report::default() }))
    }

    /// Opens the file of the access log again. If that fails, Ringway goes on writing to the old one.
    pub(super) fn reopen(&self, report: Report) -> Result<Report, CommandError> {
        let log = self.config.access_log.as_ref().filter(|log| log.is_file());
        let (Some((open, _)), Some(log)) = (&self.access_log, log) else { return Ok(report) };
        let reopened = open.reopen(&log.path, log.format);
        let failed = |error| StartError::AccessLog { path: log.path.clone(), error };
        reopened.map_err(|error| CommandError::CannotPrepare(failed(error).to_string()))?;
        Ok(report)
    }

    /// Opens the file of the access log again: a rotation may have renamed it since this process opened it, and may have told only
    /// the predecessor.
    pub(super) fn catch_up_with_rotation(&self) {
        if let Err(error) = self.reopen(Report::default()) {
            tracing::warn!(%error, "the access log was not opened again");
        }
    }
}
