//! The provider `process`: child processes that Ringway supervises.

use std::sync::Arc;

use tokio::sync::watch;

use super::source::{Boxed, Line, Prepared, ProviderStatus, Source, Update, change, line, slot_settings, slots_joined};
use crate::app::changes::OfPool;
use crate::app::context::PoolContext;
use crate::app::{Environment, StartError};
use crate::config::{self, Provider};
use crate::control::Event;
use crate::control::provider::names::Addresses;
use crate::control::supervisor::handover::Handed;
use crate::control::supervisor::process::{Ports, Settings, is_runnable, supervise};

/// The channels to the supervisor.
#[derive(Debug)]
struct Processes {
    settings: watch::Sender<Settings>,
    line: Line,
}

pub(super) fn prepare(
    key_path: &str,
    pool: &config::Pool,
    process: &config::Process,
    changes: &OfPool,
    taken_over: Vec<Handed>,
    context: &PoolContext<'_>,
) -> Result<Prepared, StartError> {
    let key_path = format!("{key_path}.provider.process");
    check_program(&key_path, process)?;
    let slots = if process.spec.uses_sockets() { 0 } else { process.replicas as usize };
    let ports = Ports::reserve(&pool.name, process.ports, slots, &taken_over)
        .map_err(|error| StartError::NoPorts { key_path: format!("{key_path}.ports"), error })?;
    let (sender, settings) = watch::channel(settings(pool, process, changes, context.environment));
    let (line, signals) = line(&pool.name, context);
    Ok(Prepared {
        source: Box::new(Processes { settings: sender, line }),
        known: slots_joined(pool, changes),
        status: ProviderStatus::Independent,
        start: Box::new(move |start| {
            let supervisor = supervise(settings, ports, taken_over, signals, start.table, start.events, start.stop);
            start.tasks.supervise(supervisor);
        }),
    })
}

impl Source for Processes {
    fn prepare_update<'a>(
        &'a self,
        key_path: &'a str,
        old: &'a config::Pool,
        new: &'a config::Pool,
    ) -> Boxed<'a, Result<Addresses, StartError>> {
        let checked = match (&old.provider, &new.provider) {
            (Provider::Process(old), Provider::Process(new)) if old.spec != new.spec => {
                check_program(&format!("{key_path}.provider.process"), new)
            }
            _ => Ok(()),
        };
        Box::pin(std::future::ready(checked.map(|()| Addresses::new())))
    }

    fn update(&mut self, update: &Update<'_>) -> Vec<Event> {
        if let Provider::Process(process) = &update.pool.provider {
            change(&self.settings, settings(update.pool, process, update.changes, update.environment));
        }
        Vec::new()
    }

    fn retire(&self) {
        self.settings.send_modify(|settings| settings.slots.replicas = 0);
    }

    fn supervisor(&self) -> Option<&Line> {
        Some(&self.line)
    }
}

fn settings(pool: &config::Pool, process: &config::Process, changes: &OfPool, environment: &Environment) -> Settings {
    Settings {
        slots: slot_settings(pool, (process.replicas, process.scaled), process.restart, process.rollout, changes),
        spec: Arc::new(process.spec.clone()),
        stop_grace: process.stop_grace,
        launcher: environment.executable.clone(),
        open_files: environment.replica_open_files,
    }
}

/// Fails if the program of the replicas is missing.
pub(super) fn check_program(key_path: &str, process: &config::Process) -> Result<(), StartError> {
    let program = process.spec.command.first().map_or("", String::as_str);
    // With a placeholder in the program or another PATH, only the start can show whether the program exists.
    let is_known = !program.contains('{') && !process.spec.env.iter().any(|(name, _)| name == "PATH");
    if is_known && !is_runnable(program) {
        return Err(StartError::NoProgram { key_path: format!("{key_path}.command"), program: program.to_owned() });
    }
    Ok(())
}
