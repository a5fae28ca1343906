//! `nkv-server [ADDR]`: the server as a program.
//!
//! Everything it says goes to stderr; its exit code tells what kind of thing went wrong.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]
#![allow(clippy::print_stderr, reason = "a program speaks to whoever started it")]

mod args;

use std::error::Error;
use std::process::ExitCode;

use nkv_core::{PersistError, PersistErrorKind};
use nkv_persist_fs::{FsOptions, FsPersist, check, repair, restore};
use nkv_server::{Builder, Server, ServerError};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::args::{Args, Command, LogFormat, Persist};

/// The command line makes no sense, or asks for what must be asked for otherwise.
const USAGE: u8 = 2;
/// The stored data is damaged.
const DAMAGED: u8 = 65;
/// Another process has the data directory.
const IN_USE: u8 = 73;
/// Reading, writing or listening failed.
const IO: u8 = 74;
/// Ended by a second signal, before all was done.
const INTERRUPTED: i32 = 130;

fn main() -> ExitCode {
    let args = Args::read();
    start_log(&args);
    match args.command {
        Some(Command::Check { repair }) => check_data(&args, repair),
        Some(Command::Restore) => restore_data(&args),
        None => serve(args),
    }
}

fn serve(args: Args) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = match runtime {
        Ok(runtime) => {
            let served = runtime.block_on(run(&args));
            // Storage that is still being read, because a signal came first, is not waited for.
            runtime.shutdown_background();
            served
        }
        Err(error) => Err(ServerError::System(error)),
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, code_of(&error)),
    }
}

async fn run(args: &Args) -> Result<(), ServerError> {
    let mut builder = Server::builder().options(args.options());
    for address in args.addresses() {
        builder = builder.listen(address);
    }
    // Before anything is opened: a signal must find somebody who listens.
    let mut terminate = signal(SignalKind::terminate()).map_err(ServerError::System)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServerError::System)?;
    let mut signalled = async || {
        tokio::select! {
            _ = terminate.recv() => info!("stopping: SIGTERM"),
            _ = interrupt.recv() => info!("stopping: SIGINT"),
        }
    };
    let mut server = tokio::select! {
        bound = with_persist(builder, args)?.bind() => bound?,
        () = signalled() => return Ok(()), // nothing was accepted yet
    };
    for address in server.addresses() {
        info!("listening at {address}");
    }
    tokio::select! {
        ended = server.failed() => return ended,
        () = signalled() => {}
    }
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        warn!("ended by a second signal");
        std::process::exit(INTERRUPTED);
    });
    server.shutdown().await?;
    info!("stopped");
    Ok(())
}

fn with_persist(builder: Builder, args: &Args) -> Result<Builder, ServerError> {
    match args.persist {
        Persist::Memory => {
            info!("values live in memory only and are gone at the end");
            Ok(builder)
        }
        Persist::Log => {
            let dir = args.data_dir()?;
            let options = FsOptions::default().with_durability(args.durability).with_group_access(args.group_access);
            info!(durability = %args.durability, "values are kept in {}", dir.display());
            let builder = builder.clock_file(dir.join("clock"));
            Ok(builder.persist(args.durability.to_string(), || FsPersist::open(dir, options)))
        }
    }
}

fn check_data(args: &Args, with_repair: bool) -> ExitCode {
    let report = args.data_dir().and_then(|dir| if with_repair { repair(dir) } else { check(dir) });
    match report {
        Ok(report) => {
            eprint!("{report}");
            if report.damage.is_some() && !with_repair { ExitCode::from(DAMAGED) } else { ExitCode::SUCCESS }
        }
        Err(error) => fail(&error, persist_code(&error)),
    }
}

fn restore_data(args: &Args) -> ExitCode {
    match args.data_dir().and_then(restore) {
        Ok(report) => {
            info!(epoch = %report.epoch, keys = report.keys, revision = report.revision.get(), "a new epoch begins");
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error, persist_code(&error)),
    }
}

fn start_log(args: &Args) {
    use std::io::IsTerminal;
    let ansi = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let log = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(args.log_level)
        .with_target(false)
        .with_ansi(ansi);
    match args.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}

/// One line, from the outermost cause to the innermost.
fn fail(error: &dyn Error, code: u8) -> ExitCode {
    let mut line = format!("nkv-server: {error}");
    let mut cause = error.source();
    while let Some(inner) = cause {
        line.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    eprintln!("{line}");
    ExitCode::from(code)
}

fn code_of(error: &ServerError) -> u8 {
    match error {
        ServerError::Insecure { .. } => USAGE,
        ServerError::Persist(error) => persist_code(error),
        _ => IO,
    }
}

fn persist_code(error: &PersistError) -> u8 {
    match error.kind() {
        PersistErrorKind::Damaged => DAMAGED,
        PersistErrorKind::InUse => IN_USE,
        PersistErrorKind::Rejected => USAGE,
        _ => IO,
    }
}
