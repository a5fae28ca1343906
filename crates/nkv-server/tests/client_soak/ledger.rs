//! What was written, as its writers know: the truth that everything a client says is compared with.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard};

/// How many puts of a key are remembered.
const REMEMBERED: usize = 256;

/// What became of a put.
#[derive(Clone, Debug, PartialEq)]
enum Put {
    /// Not answered yet, or its outcome is unknown; the revision at which its value was seen.
    Open(Option<u64>),
    /// Answered with this revision.
    Written(u64),
    /// Answered with an error that says that nothing was changed.
    Nothing(String),
}

#[derive(Debug, Default)]
struct Log {
    /// The puts from `first` on.
    puts: VecDeque<Put>,
    first: u64,
    /// The highest revision of the key that was acknowledged or read: nothing older may be read from now on.
    floor: u64,
}

/// The puts of each key. Each writes a value of its own.
#[derive(Debug)]
pub struct Ledger(BTreeMap<String, Mutex<Log>>);

impl Ledger {
    pub fn new(keys: impl IntoIterator<Item = String>) -> Self {
        Ledger(keys.into_iter().map(|key| (key, Mutex::default())).collect())
    }

    pub fn keys(&self) -> impl Iterator<Item = &String> {
        self.0.keys()
    }

    fn log(&self, key: &str) -> MutexGuard<'_, Log> {
        self.0[key].lock().unwrap()
    }

    pub fn floor(&self, key: &str) -> u64 {
        self.log(key).floor
    }

    pub fn raise(&self, key: &str, revision: u64) {
        let mut log = self.log(key);
        log.floor = log.floor.max(revision);
    }

    /// Begins a put: its number and its value.
    pub fn begin(&self, key: &str) -> (u64, String) {
        let mut log = self.log(key);
        if log.puts.len() == REMEMBERED {
            log.puts.pop_front();
            log.first += 1;
        }
        log.puts.push_back(Put::Open(None));
        let number = log.first + log.puts.len() as u64 - 1;
        (number, value(key, number))
    }

    /// Notes the answer to a put; an error if what was seen before contradicts it.
    pub fn written(&self, key: &str, number: u64, revision: u64) -> Result<(), String> {
        let mut log = self.log(key);
        log.floor = log.floor.max(revision);
        let Some(put) = log.put(number) else { return Ok(()) };
        match std::mem::replace(put, Put::Written(revision)) {
            Put::Open(Some(seen)) if seen != revision => {
                Err(format!("put {number} was answered with revision {revision}, and its value was seen at {seen}"))
            }
            _ => Ok(()),
        }
    }

    /// Notes that a put has changed nothing, as its error says.
    pub fn nothing(&self, key: &str, number: u64, error: String) -> Result<(), String> {
        let mut log = self.log(key);
        let Some(put) = log.put(number) else { return Ok(()) };
        match std::mem::replace(put, Put::Nothing(error.clone())) {
            Put::Open(Some(seen)) => {
                Err(format!("put {number} changed nothing ({error}), and its value was seen at revision {seen}"))
            }
            _ => Ok(()),
        }
    }

    /// Notes what was read; an error if it was not written, or not there.
    pub fn seen(&self, key: &str, revision: u64, bytes: &[u8]) -> Result<(), String> {
        let text = String::from_utf8_lossy(bytes);
        let number = text.strip_prefix(key).and_then(|rest| rest.strip_prefix('#')?.split(' ').next()?.parse().ok());
        let Some(number) = number.filter(|number| text == value(key, *number)) else {
            return Err(format!("the value is of another key, or torn: {text:.80}"));
        };
        let mut log = self.log(key);
        if number >= log.first + log.puts.len() as u64 {
            return Err(format!("put {number} was never made"));
        }
        let Some(put) = log.put(number) else { return Ok(()) };
        match put {
            Put::Open(Some(other)) | Put::Written(other) if *other != revision => {
                Err(format!("the value of put {number} is at revision {revision}, and was written at {other}"))
            }
            Put::Nothing(error) => Err(format!("the value of put {number} is there, which changed nothing: {error}")),
            Put::Open(seen) => {
                *seen = Some(revision);
                Ok(())
            }
            Put::Written(_) => Ok(()),
        }
    }
}

impl Log {
    /// A put; `None` if it is too long ago.
    fn put(&mut self, number: u64) -> Option<&mut Put> {
        self.puts.get_mut(usize::try_from(number.checked_sub(self.first)?).unwrap())
    }
}

/// The value of a put: of one of many lengths, and recognisable when torn.
fn value(key: &str, number: u64) -> String {
    let padding = if number % 97 == 96 { 20_000 } else { [0, 20, 300][number as usize % 3] };
    format!("{key}#{number} {}", "x".repeat(padding))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_written_or_is_reported_wrongly_is_found() {
        let ledger = Ledger::new(["a".to_owned(), "b".to_owned()]);
        let puts: Vec<_> = (0..6).map(|_| ledger.begin("a")).collect();
        let seen = |number: usize, revision| ledger.seen("a", revision, puts[number].1.as_bytes());
        let number = |number: usize| puts[number].0;
        // As it should be, in each order.
        assert_eq!((seen(0, 5), ledger.written("a", number(0), 5), seen(0, 5)), (Ok(()), Ok(()), Ok(())));
        assert_eq!((ledger.written("a", number(1), 6), seen(1, 6), seen(2, 7)), (Ok(()), Ok(()), Ok(())));
        assert_eq!((ledger.floor("a"), ledger.floor("b")), (6, 0));
        // Another revision, written twice, nothing that is there, never made, of another key, torn.
        assert!(seen(0, 8).unwrap_err().contains("written at 5"));
        assert!(seen(2, 9).unwrap_err().contains("written at 7"));
        assert!(ledger.written("a", number(2), 9).unwrap_err().contains("seen at 7"));
        assert_eq!(ledger.nothing("a", number(3), "busy".into()), Ok(()));
        assert!(seen(3, 10).unwrap_err().contains("busy"));
        assert_eq!(seen(4, 11), Ok(()));
        assert!(ledger.nothing("a", number(4), "busy".into()).unwrap_err().contains("seen at revision 11"));
        assert!(ledger.seen("a", 12, value("a", 6).as_bytes()).unwrap_err().contains("never made"));
        assert!(ledger.seen("b", 12, puts[0].1.as_bytes()).unwrap_err().contains("another key"));
        assert!(ledger.seen("a", 5, &puts[1].1.as_bytes()[..9]).unwrap_err().contains("torn"));
    }

    #[test]
    fn old_puts_are_forgotten() {
        let ledger = Ledger::new(["a".to_owned()]);
        let (first, value) = ledger.begin("a");
        (0..REMEMBERED).for_each(|_| _ = ledger.begin("a"));
        assert_eq!((ledger.written("a", first, 1), ledger.seen("a", 2, value.as_bytes())), (Ok(()), Ok(())));
        assert_eq!(ledger.log("a").puts.len(), REMEMBERED);
    }
}
