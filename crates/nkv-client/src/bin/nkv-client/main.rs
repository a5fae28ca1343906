//! `nkv-client`: reads, writes and watches the values of an nkv server, one command at a time or interactively.

mod args;
mod output;
mod repl;
mod run;

use std::env::VarError;
use std::process::ExitCode;
use std::time::Duration;

use nkv_client::{Addr, Client};
use tokio::runtime::Runtime;

use args::{Args, Command};
use output::{Output, complain};
use run::{Exit, Failure};

fn main() -> ExitCode {
    let (addr, args) = match Args::from_command_line(std::env::args_os().collect()) {
        Ok(parsed) => parsed,
        Err(error) => {
            // What cannot be shown cannot be helped.
            drop(error.print());
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(Exit::Usage as u8));
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("nkv-client: cannot start a thread: {error}"));
            return ExitCode::from(Exit::Failed as u8);
        }
    };
    let json = args.json;
    let exit = serve(&runtime, addr, &args).unwrap_or_else(|failure| failure.report(json));
    // A thread may be waiting for stdin.
    runtime.shutdown_background();
    ExitCode::from(exit as u8)
}

fn serve(runtime: &Runtime, addr: Option<String>, args: &Args) -> Result<Exit, Failure> {
    match &args.command {
        Some(Command::Unsubscribe { key }) => {
            let what = format!("'unsubscribe {key}' belongs to the interactive mode; Ctrl-C ends a subscribe");
            Err(Failure::Usage(what))
        }
        Some(command) => runtime.block_on(interruptible(async {
            let client = connect(addr, args.timeout).await?;
            run::run(&client, command, Output::new(args.json, false)).await
        })),
        None => {
            let client = runtime.block_on(interruptible(connect(addr, args.timeout)))?;
            repl::serve(runtime, &client, args.json)
        }
    }
}

async fn connect(addr: Option<String>, timeout: Option<Duration>) -> Result<Client, Failure> {
    let addr = match addr {
        Some(addr) => addr,
        None => match variable("NKV_ADDR")? {
            Some(addr) => match addr.parse::<Addr>() {
                Ok(_) => addr,
                Err(error) => return Err(Failure::Usage(format!("NKV_ADDR: {error:#}"))),
            },
            None => Addr::default().to_string(),
        },
    };
    let mut builder = Client::builder(&addr);
    if let Some(timeout) = timeout {
        builder = builder.request_timeout(timeout).connect_timeout(timeout);
    }
    if let Some(token) = variable("NKV_TOKEN")? {
        builder = builder.token(token);
    }
    Ok(builder.connect().await?)
}

fn variable(name: &str) -> Result<Option<String>, Failure> {
    match std::env::var(name) {
        Ok(value) if !value.is_empty() => Ok(Some(value)),
        Ok(_) | Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(_)) => Err(Failure::Usage(format!("{name} is not UTF-8"))),
    }
}

/// Work that Ctrl-C ends.
pub(crate) async fn interruptible<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::select! {
        // Listening begins when this is first polled: before the work, which may have told somebody that it goes on.
        biased;
        interrupted = tokio::signal::ctrl_c() => match interrupted {
            Ok(()) => Err(Failure::Interrupted),
            Err(error) => Err(Failure::System(format!("cannot listen for Ctrl-C: {error}"))),
        },
        done = work => done,
    }
}
