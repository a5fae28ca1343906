//! `nkv-client`: reads, writes and watches the values of an nkv server, one command at a time or interactively.

mod args;
mod failure;
mod follow;
mod kv_store;
mod output;
mod repl;
mod run;
mod script;
mod session;
mod stdio;

use std::env::VarError;
use std::future::pending;
use std::process::ExitCode;
use std::time::Duration;

use nkv_client::{Address, Client};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use args::{Args, Command, asks_for_json, in_short};
use failure::{Exit, Failure};
use follow::Follow;
use output::{Output, Place};
use session::Settings;

/// Longest name for people that a server takes.
const NAME_LEN_MAX: usize = 256;
/// How long a server that said nothing is looked at again.
const LOOK_LIMIT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().collect();
    let is_json = asks_for_json(&words);
    let (addr, args) = match Args::from_command_line(words) {
        Ok(parsed) => parsed,
        Err(error) if is_json && error.use_stderr() => {
            let out = Output::new(true, false, Place::CommandLine);
            return ExitCode::from(Failure::Usage(in_short(&error)).report(out, None) as u8);
        }
        Err(error) => {
            // What cannot be shown cannot be helped.
            drop(error.print());
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(Exit::Usage as u8));
        }
    };
    let out = Output::new(args.json, args.quiet, Place::CommandLine);
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let failure = Failure::System(format!("cannot start a thread: {error}"));
            return ExitCode::from(failure.report(out, args.command.as_ref()) as u8);
        }
    };
    let exit = serve(&runtime, addr, &args, out);
    let exit = exit.unwrap_or_else(|failure| failure.report(out, args.command.as_ref()));
    // A thread may be waiting for stdin.
    runtime.shutdown_background();
    ExitCode::from(exit as u8)
}

fn serve(runtime: &Runtime, addr: Option<String>, args: &Args, out: Output) -> Result<Exit, Failure> {
    let Some(command) = &args.command else {
        let client = runtime.block_on(interruptible(connect(addr, args)))?;
        let exit = repl::serve(runtime, &client, Settings { out, timeout: args.timeout });
        #[cfg(feature = "ws")]
        runtime.block_on(leave(&client));
        return exit;
    };
    if let Command::Unsubscribe { key } = command {
        let what = format!("'unsubscribe {key}' belongs to the interactive mode; Ctrl-C ends a subscribe");
        return Err(Failure::Usage(what));
    }
    run::check(command)?;
    runtime.block_on(async {
        end_when_interrupted().await;
        let client = connect(addr, args).await?;
        let exit = match Follow::new(command, args.timeout) {
            Some(follow) => follow::run(&client, &follow, out).await,
            None => run::run(&client, command, out).await,
        };
        #[cfg(feature = "ws")]
        leave(&client).await;
        exit
    })
}

/// Closes the connection in order, where the protocol below has words for that.
#[cfg(feature = "ws")]
async fn leave(client: &Client) {
    client.close();
    let mut state = client.state();
    // It is closed without waiting for the server.
    let closed = state.wait_for(|state| *state == nkv_client::ConnectionState::Closed);
    _ = tokio::time::timeout(LOOK_LIMIT, closed).await;
}

async fn connect(addr: Option<String>, args: &Args) -> Result<Client, Failure> {
    let addr = match addr {
        Some(addr) => addr,
        None => match variable("NKV_ADDR")? {
            Some(addr) => match addr.parse::<Address>() {
                Ok(_) => addr,
                Err(error) => return Err(Failure::Usage(format!("NKV_ADDR: {error:#}"))),
            },
            None => Address::default().to_string(),
        },
    };
    let mut builder = Client::builder(&addr);
    if let Some(timeout) = args.timeout {
        builder = builder.request_timeout(timeout).connect_timeout(timeout);
    }
    if let Some(wait) = args.wait {
        builder = builder.wait_for_server(wait);
    }
    let (name, from) = match &args.name {
        Some(name) => (Some(name.clone()), "--name"),
        None => (variable("NKV_NAME")?, "NKV_NAME"),
    };
    if let Some(name) = name.filter(|name| !name.is_empty()) {
        if name.len() > NAME_LEN_MAX || name.contains(char::is_control) {
            let what = format!("{from}: a name has {NAME_LEN_MAX} bytes at most, and no control characters");
            return Err(Failure::Usage(what));
        }
        builder = builder.name(name);
    }
    if let Some(token) = variable("NKV_TOKEN")? {
        builder = builder.token(token);
    }
    match builder.connect().await {
        Ok(client) => Ok(client),
        Err(error) if error.to_string().contains("no answer within") && takes_connections(&addr).await => {
            Err(Failure::Timeout(format!("{error}, although it takes connections")))
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether a server is there: one that hangs is not one that is absent.
async fn takes_connections(addr: &str) -> bool {
    let connected = async {
        match addr.parse::<Address>() {
            Ok(Address::Tcp { host, port } | Address::Ws { host, port, .. }) => {
                TcpStream::connect((host.as_str(), port)).await.is_ok()
            }
            Ok(Address::Unix { path }) => UnixStream::connect(path).await.is_ok(),
            _ => false,
        }
    };
    tokio::time::timeout(LOOK_LIMIT, connected).await.unwrap_or(false)
}

fn variable(name: &str) -> Result<Option<String>, Failure> {
    match std::env::var(name) {
        Ok(value) if !value.is_empty() => Ok(Some(value)),
        Ok(_) | Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(_)) => Err(Failure::Usage(format!("{name} is not UTF-8"))),
    }
}

/// From now on Ctrl-C ends the program, also while it waits for its stdin, or for its stdout to be read.
pub(crate) async fn end_when_interrupted() {
    let (listening, listens) = oneshot::channel();
    tokio::spawn(async {
        let interrupted = interruptible(async {
            // It is not waited for if the runtime is shutting down.
            _ = listening.send(());
            pending::<Result<(), Failure>>().await
        });
        if let Err(Failure::Interrupted) = interrupted.await {
            std::process::exit(i32::from(Exit::Interrupted as u8));
        }
    });
    // An error means that listening is not possible; commands are run all the same.
    _ = listens.await;
}

/// Work that Ctrl-C ends.
pub(crate) async fn interruptible<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::select! {
        // Listening begins when this is first polled: before the work, which may have reported that it goes on.
        biased;
        interrupted = tokio::signal::ctrl_c() => match interrupted {
            Ok(()) => Err(Failure::Interrupted),
            Err(error) => Err(Failure::System(format!("cannot listen for Ctrl-C: {error}"))),
        },
        done = work => done,
    }
}
