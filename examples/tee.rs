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

use nkv_core::mailbox::Mailbox;
use nkv_core::{Action, CHANGES_LEN_MAX, Changes, Key, NoPersist, NotifyKeyValue, Op, Pattern, PutOptions};

/// Writes one line for each change, and an empty one behind each group, until the store is gone.
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

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let temporary = tempfile::tempdir()?;
    let path = temporary.path().join("changes.txt");
    let store: NotifyKeyValue<NoPersist, Mailbox> = NotifyKeyValue::open(NoPersist::default())?;
    let (changes, file) = (store.changes(None, CHANGES_LEN_MAX)?, File::create(&path)?);
    let writer = thread::spawn(move || tee(changes, file));

    let hall = Key::new("lamp.hall")?;
    store.put(&hall, "on", PutOptions::default())?;
    store.put(&hall, "off", PutOptions::default())?;
    let put = |key: &str, value: &'static str| -> Result<Op, Box<dyn Error + Send + Sync>> {
        Ok(Op::Put { key: Key::new(key)?, value: value.into(), options: PutOptions::default() })
    };
    store.write(&[put("scene.name", "evening")?, put("scene.lamps", "dimmed")?])?; // one caller, one group
    store.delete(&Pattern::from(&hall), None)?;
    drop(store);

    let written = writer.join().map_err(|_| "the writer broke")??;
    let text = fs::read_to_string(path)?;
    print!("{text}");
    assert_eq!(written, 5);
    let expected = "1 put lamp.hall on\n\n2 put lamp.hall off\n\n\
        3 put scene.name evening\n4 put scene.lamps dimmed\n\n5 deleted lamp.hall\n\n";
    assert_eq!(text, expected);
    Ok(())
}
