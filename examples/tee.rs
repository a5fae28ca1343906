//! A tee: every change of the store, in order, as lines of a file. The same loop feeds a replica, an audit log or a queue.
//!
//! ```text
//! cargo run -p nkv-examples --example tee
//! ```
//!
//! A subscriber gets the latest value of each key. This reader gets every change exactly as it was committed, in groups that one
//! caller gave as one. It is bounded too: a reader that lags too far has a definite `Gap`, and then reads the whole state anew.

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::thread;

use nkv_core::{Action, Changes, Key, Op, PutOptions};
use nkv_server::Server;

/// Writes one line for each change, and an empty one behind each group, until the server has stopped.
fn tee(mut changes: Changes, file: File) -> Result<u64, Box<dyn Error + Send + Sync>> {
    let (mut file, mut written) = (BufWriter::new(file), 0);
    while let Some(group) = changes.next_blocking()? {
        for change in group.changes.iter() {
            match &change.action {
                Action::Put { value, .. } => {
                    writeln!(file, "{} put {} {}", change.revision, change.key, value.escape_ascii())?;
                }
                Action::Delete { reason } => writeln!(file, "{} {} {}", change.revision, reason.as_str(), change.key)?,
            }
            written += 1;
        }
        writeln!(file)?;
    }
    file.flush()?;
    Ok(written)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let temporary = tempfile::tempdir()?;
    let path = temporary.path().join("changes.txt");
    let server = Server::builder().bind().await?; // with `listen`, other processes change the same store
    let nkv = server.handle();
    let (changes, file) = (nkv.changes(None)?, File::create(&path)?);
    let writer = thread::spawn(move || tee(changes, file));

    nkv.put("lamp.hall", "on").await?;
    nkv.put("lamp.hall", "off").await?;
    let put = |key: &str, value: &'static str| -> Result<Op, nkv_core::KeyError> {
        Ok(Op::Put { key: Key::new(key)?, value: value.into(), options: PutOptions::default() })
    };
    nkv.write(vec![put("scene.name", "evening")?, put("scene.lamps", "dimmed")?]).await?; // one caller, one group
    nkv.delete("lamp.hall").await?;
    drop(nkv);
    server.shutdown().await?;

    let written = writer.join().map_err(|_| "the writer broke")??;
    let text = fs::read_to_string(path)?;
    print!("{text}");
    assert_eq!(written, 5);
    let expected = "1 put lamp.hall on\n\n2 put lamp.hall off\n\n\
        3 put scene.name evening\n4 put scene.lamps dimmed\n\n5 deleted lamp.hall\n\n";
    assert_eq!(text, expected);
    Ok(())
}
