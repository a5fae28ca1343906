//! A simulated disk, for tests: it forgets what was not synced, in every way that a real one may.
//!
//! Per file it knows the durable bytes and, per sector of 512 bytes, each version written since; per directory the
//! durable names and the changes since. [`SimFs::crash`] makes the disk that a power cut could leave: each sector in
//! any of its versions, or zeros or garbage where nothing was durable; any length in between; any subset of the changes
//! of names. Syncing a file does not make its name durable. A sync that failed drops what it should have written, and
//! later syncs succeed without it, as on Linux; a directory whose sync failed stays in doubt.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    reason = "no test gives it what does not fit, and one that does shall fail"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::vfs::{Open, Vfs, VfsFile};

const SECTOR: usize = 512;

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is done and the device is blamed.
    Eio,
    /// Nothing is done, as there is no space.
    NoSpace,
    /// Nothing is done, as there is no space for this user.
    Quota,
    /// A write writes half of its bytes, and the next write fails for want of space; other calls just fail.
    Short,
    /// A write is done and then said to have failed; other calls just fail.
    Late,
    /// The call is interrupted before it does anything; if for ever, every second write.
    Interrupted,
}

/// A disk in memory; clones are the same disk.
#[derive(Clone, Debug, Default)]
pub struct SimFs {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    nodes: Vec<Node>,
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    /// For each name the values it had since its directory was synced.
    name_history: BTreeMap<PathBuf, Vec<Option<usize>>>,
    /// Directories of which a sync has failed: none of their names is durable any more, whatever later syncs say.
    doubtful_dirs: BTreeSet<PathBuf>,
    locked: BTreeSet<usize>,
    /// How many times each file is open: a file without a name keeps its space until it is closed.
    open: BTreeMap<usize, usize>,
    calls: u64,
    mutations: u64,
    syncs: u64,
    power_cut_at: Option<u64>,
    fault: Option<(u64, Fault, bool)>,
    evict_at: Option<u64>,
    capacity: Option<u64>,
    copies_on_write: bool,
    read_only: bool,
    set_len_fails: bool,
}

#[derive(Clone, Debug, Default)]
struct Node {
    is_dir: bool,
    bytes: Vec<u8>,
    durable: Vec<u8>,
    sectors: BTreeMap<usize, Vec<Vec<u8>>>,
    lens: Vec<usize>,
    /// Sectors that a failed sync did not write, and that no later one will, unless they are written to again.
    dropped: BTreeSet<usize>,
}

/// What a call does, as far as power cuts and faults are concerned.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Read,
    Write,
    Change,
}

impl SimFs {
    /// An empty disk.
    #[must_use]
    pub fn new() -> Self {
        SimFs::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many calls were made.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// How many calls were made that change something.
    #[must_use]
    pub fn mutations(&self) -> u64 {
        self.state().mutations
    }

    /// How many files and directories were synced.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.state().syncs
    }

    /// Cuts the power before the changing call with this number, counted from 0: it and all later calls fail.
    pub fn cut_power_at(&self, mutation: u64) {
        self.state().power_cut_at = Some(mutation);
    }

    /// Makes the call with this number fail, counted from 0, and if `forever` all changing calls after it too.
    pub fn fail_at(&self, call: u64, fault: Fault, forever: bool) {
        self.state().fault = Some((call, fault, forever));
    }

    /// Lets the system forget, before the call with this number, what failed syncs have left in memory alone.
    pub fn evict_at(&self, call: u64) {
        self.state().evict_at = Some(call);
    }

    /// Ends the faults.
    pub fn heal(&self) {
        self.state().fault = None;
    }

    /// Whether a sync of a directory has failed: no sync makes a name in it durable from then on.
    #[must_use]
    pub fn has_doubtful_dir(&self) -> bool {
        !self.state().doubtful_dirs.is_empty()
    }

    /// Sets how many bytes all files together may have.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity = bytes;
    }

    /// Makes each write take new space before what it replaces is free, as on a file system that copies on write.
    pub fn set_copies_on_write(&self, copies_on_write: bool) {
        self.state().copies_on_write = copies_on_write;
    }

    /// Makes all calls that change something fail, as on a file system that is mounted for reading only.
    pub fn set_read_only(&self, read_only: bool) {
        self.state().read_only = read_only;
    }

    /// Makes all calls fail that set the length of a file.
    pub fn set_len_fails(&self, fails: bool) {
        self.state().set_len_fails = fails;
    }

    /// How many bytes all files together have.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.state().used()
    }

    /// The bytes of a file, as a process sees them.
    #[must_use]
    pub fn read(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.state();
        state.names.get(path).map(|node| state.nodes[*node].bytes.clone())
    }

    /// Puts a durable file there, or takes it away.
    pub fn place(&self, path: &Path, bytes: Option<Vec<u8>>) {
        let mut state = self.state();
        let Some(bytes) = bytes else {
            state.names.remove(path);
            state.durable_names.remove(path);
            return;
        };
        let node = state.nodes.len();
        state.nodes.push(Node { durable: bytes.clone(), bytes, ..Node::default() });
        state.names.insert(path.to_owned(), node);
        state.durable_names.insert(path.to_owned(), node);
    }

    /// A number that says, as far as a hash can, what a process would find.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let (state, mut hasher) = (self.state(), DefaultHasher::new());
        state.names.iter().for_each(|(path, node)| (path, &state.nodes[*node].bytes).hash(&mut hasher));
        hasher.finish()
    }

    /// The same disk, unharmed, for another test: what the processes on this one leave when they are killed. What was
    /// not synced is there, and a power cut can still take it.
    #[must_use]
    pub fn fork(&self) -> SimFs {
        let state = self.state();
        let mut copy = State::of(state.nodes.clone(), state.names.clone(), &state.durable_names);
        copy.name_history.clone_from(&state.name_history);
        SimFs { state: Arc::new(Mutex::new(copy)) }
    }

    /// A disk that a power cut could leave now. `choose(n)` picks one of `n` possibilities, again and again; 0 is what
    /// had been durable, 1 the newest.
    #[must_use]
    pub fn crash(&self, choose: &mut dyn FnMut(usize) -> usize) -> SimFs {
        let state = self.state();
        let mut names = state.durable_names.clone();
        for (path, history) in &state.name_history {
            let choice = choose(history.len() + 1);
            if let Some(target) = choice.checked_sub(1).map(|back| history[history.len() - 1 - back]) {
                match target {
                    Some(node) => names.insert(path.clone(), node),
                    None => names.remove(path),
                };
            }
        }
        let dirs: BTreeSet<PathBuf> = names.keys().filter(|p| state.nodes[names[*p]].is_dir).cloned().collect();
        names.retain(|path, _| path.parent().is_none_or(|parent| is_root(parent) || dirs.contains(parent)));
        let reachable: BTreeSet<usize> = names.values().copied().collect();
        let mut crash_node = |(number, node): (usize, &Node)| {
            if reachable.contains(&number) { node.crash(choose) } else { Node::default() }
        };
        let nodes = state.nodes.iter().enumerate().map(&mut crash_node).collect();
        SimFs { state: Arc::new(Mutex::new(State::of(nodes, names.clone(), &names))) }
    }
}

impl Node {
    fn note_sector(&mut self, sector: usize) {
        let version = sector_of(&self.bytes, sector);
        self.dropped.remove(&sector);
        self.sectors.entry(sector).or_default().push(version);
    }

    fn set_len(&mut self, len: usize) {
        let changed = self.bytes.len().min(len)..self.bytes.len().max(len);
        self.lens.push(len);
        self.bytes.resize(len, 0);
        if !changed.is_empty() {
            (changed.start / SECTOR..changed.end.div_ceil(SECTOR)).for_each(|sector| self.note_sector(sector));
        }
    }

    fn write(&mut self, bytes: &[u8], offset: usize) {
        let end = offset + bytes.len();
        if end > self.bytes.len() {
            self.lens.push(end);
            self.bytes.resize(end, 0);
        }
        self.bytes[offset..end].copy_from_slice(bytes);
        (offset / SECTOR..end.div_ceil(SECTOR)).for_each(|sector| self.note_sector(sector));
    }

    fn sync(&mut self) {
        // What is not written is what it was, or, where nothing was, zeros.
        self.durable.resize(self.bytes.len(), 0);
        for sector in self.sectors.keys().filter(|sector| !self.dropped.contains(sector)) {
            let start = self.bytes.len().min(sector * SECTOR);
            let end = self.bytes.len().min(start + SECTOR);
            self.durable[start..end].copy_from_slice(&self.bytes[start..end]);
        }
        self.sectors.retain(|sector, _| self.dropped.contains(sector));
        self.lens.clear();
    }

    /// A sync that fails: the system takes what it could not write for written.
    fn fail_sync(&mut self) {
        self.dropped.extend(self.sectors.keys());
    }

    /// From now on readers see what the disk has, or zeros where it has nothing.
    fn evict(&mut self) {
        for sector in std::mem::take(&mut self.dropped) {
            let old = sector_of(&self.durable, sector);
            let start = self.bytes.len().min(sector * SECTOR);
            let end = self.bytes.len().min(start + SECTOR);
            self.bytes[start..end].copy_from_slice(&old[..end - start]);
            self.sectors.remove(&sector);
        }
    }

    fn crash(&self, choose: &mut dyn FnMut(usize) -> usize) -> Node {
        let len = self.crash_len(choose);
        let mut bytes = self.durable.clone();
        bytes.resize(len, 0);
        for (sector, versions) in self.sectors.iter().filter(|(sector, _)| *sector * SECTOR < len) {
            let count = versions.len();
            let mut version = match choose(count + 3) {
                0 => continue,
                choice if choice <= count => versions[count - choice].clone(),
                choice if choice == count + 1 => vec![0; SECTOR],
                _ => (0..SECTOR).map(|i| (i * 151 + sector * 13 + 7) as u8).collect(),
            };
            if !versions.contains(&version) {
                // A write that fails leaves alone the durable bytes that it did not change, also in its own sector.
                let durable = self.durable.get(sector * SECTOR..).unwrap_or_default();
                for (at, old) in durable.iter().enumerate().take(SECTOR) {
                    if versions.iter().all(|new| new[at] == *old) {
                        version[at] = *old;
                    }
                }
            }
            let end = len.min((sector + 1) * SECTOR);
            bytes[sector * SECTOR..end].copy_from_slice(&version[..end - sector * SECTOR]);
        }
        Node { is_dir: self.is_dir, durable: bytes.clone(), bytes, ..Node::default() }
    }

    /// The durable length, the newest, another that it had, or one in between.
    fn crash_len(&self, choose: &mut dyn FnMut(usize) -> usize) -> usize {
        let Some(newest) = self.lens.last() else { return self.durable.len() };
        let count = self.lens.len();
        match choose(count + 2) {
            0 => self.durable.len(),
            choice if choice <= count => self.lens[count - choice],
            _ => {
                let (low, high) = (self.durable.len().min(*newest), self.durable.len().max(*newest));
                low + (high - low) * (choose(7) + 1) / 8
            }
        }
    }
}

impl State {
    fn of(nodes: Vec<Node>, names: BTreeMap<PathBuf, usize>, durable: &BTreeMap<PathBuf, usize>) -> Self {
        State { nodes, names, durable_names: durable.clone(), ..State::default() }
    }

    fn is_off(&self) -> bool {
        self.power_cut_at.is_some_and(|at| self.mutations >= at)
    }

    /// Counts a call, and fails it if it is its turn. Gives the fault if the call must do half of its work.
    fn enter(&mut self, call: Call) -> io::Result<Option<Fault>> {
        let number = self.calls;
        self.calls += 1;
        if self.evict_at == Some(number) {
            self.nodes.iter_mut().for_each(Node::evict);
        }
        if self.is_off() {
            return Err(io::Error::other("the power is cut"));
        }
        if self.read_only && call != Call::Read {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.mutations += u64::from(call != Call::Read);
        let Some((at, fault, forever)) = self.fault else { return Ok(None) };
        let due = number == at || (forever && number > at && call != Call::Read);
        match fault {
            _ if !due => Ok(None),
            Fault::Short if call == Call::Write && number == at => {
                self.fault = Some((number + 1, Fault::NoSpace, forever));
                Ok(Some(fault))
            }
            Fault::Late if call == Call::Write => Ok(Some(fault)),
            Fault::Eio | Fault::Late => Err(io::Error::other("injected EIO")),
            // The standard library tries other calls again, and for ever would be for ever.
            Fault::Interrupted if call == Call::Change || !(number - at).is_multiple_of(2) => Ok(None),
            Fault::Interrupted => Err(io::ErrorKind::Interrupted.into()),
            _ if call == Call::Read => Err(io::Error::other("injected EIO")),
            Fault::Quota => Err(io::ErrorKind::QuotaExceeded.into()),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    fn used(&self) -> u64 {
        let taken: BTreeSet<usize> = self.names.values().chain(self.open.keys()).copied().collect();
        taken.iter().map(|node| self.nodes[*node].bytes.len() as u64).sum()
    }

    fn set_name(&mut self, path: &Path, node: Option<usize>) {
        match node {
            Some(node) => self.names.insert(path.to_owned(), node),
            None => self.names.remove(path),
        };
        self.name_history.entry(path.to_owned()).or_default().push(node);
    }

    fn make(&mut self, path: &Path, is_dir: bool) -> usize {
        self.nodes.push(Node { is_dir, ..Node::default() });
        self.set_name(path, Some(self.nodes.len() - 1));
        self.nodes.len() - 1
    }

    fn sync_names(&mut self, dir: &Path) {
        self.syncs += 1;
        if self.doubtful_dirs.contains(dir) {
            return;
        }
        let own: Vec<PathBuf> = self.name_history.keys().filter(|path| path.parent() == Some(dir)).cloned().collect();
        let mut gone = Vec::new();
        for path in own {
            gone.extend(self.name_history.remove(&path).into_iter().flatten().flatten());
            gone.extend(match self.names.get(&path) {
                Some(node) => self.durable_names.insert(path, *node),
                None => self.durable_names.remove(&path),
            });
        }
        gone.retain(|node| !self.is_reachable(*node));
        gone.into_iter().for_each(|node| self.nodes[node] = Node::default());
    }

    /// Whether a file has a name, or may have one after a crash, or is open.
    fn is_reachable(&self, node: usize) -> bool {
        let past = self.name_history.values().flatten().flatten();
        let mut named = self.names.values().chain(self.durable_names.values()).chain(past);
        self.open.contains_key(&node) || named.any(|known| *known == node)
    }
}

impl Vfs for SimFs {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        if is_root(dir) {
            return Ok(());
        }
        let parent = dir.parent().unwrap_or(Path::new(""));
        if self.state().names.contains_key(dir) {
            return self.sync_dir(parent);
        }
        self.create_dir(parent)?;
        let mut state = self.state();
        state.enter(Call::Change)?;
        state.make(dir, true);
        drop(state);
        self.sync_dir(parent)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut state = self.state();
        state.enter(Call::Read)?;
        let own = state.names.keys().filter(|path| path.parent() == Some(dir));
        Ok(own.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect())
    }

    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn VfsFile>> {
        let mut state = self.state();
        let known = state.names.get(path).copied();
        let makes = known.is_none() && matches!(how, Open::Create | Open::CreateNew);
        if state.read_only && how != Open::Read {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        state.enter(if makes { Call::Change } else { Call::Read })?;
        let node = match known {
            Some(_) if how == Open::CreateNew => return Err(io::ErrorKind::AlreadyExists.into()),
            Some(node) => node,
            None if makes => state.make(path, false),
            None => return Err(io::ErrorKind::NotFound.into()),
        };
        *state.open.entry(node).or_default() += 1;
        Ok(Arc::new(SimFile { fs: self.clone(), node, locked: Mutex::new(false) }))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        if !state.names.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.enter(Call::Change)?;
        state.set_name(path, None);
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.state();
        if let Err(error) = state.enter(Call::Change) {
            if !state.is_off() {
                state.doubtful_dirs.insert(dir.to_owned());
            }
            return Err(error);
        }
        state.sync_names(dir);
        Ok(())
    }
}

#[derive(Debug)]
struct SimFile {
    fs: SimFs,
    node: usize,
    locked: Mutex<bool>,
}

impl VfsFile for SimFile {
    fn size(&self) -> io::Result<u64> {
        let mut state = self.fs.state();
        state.enter(Call::Read)?;
        Ok(state.nodes[self.node].bytes.len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.fs.state();
        state.enter(Call::Read)?;
        let bytes = state.nodes[self.node].bytes.get(offset as usize..).unwrap_or_default();
        let len = bytes.len().min(buf.len());
        buf[..len].copy_from_slice(&bytes[..len]);
        Ok(len)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let mut state = self.fs.state();
        let fault = state.enter(Call::Write)?;
        let end = offset + bytes.len() as u64;
        let kept = if state.copies_on_write { offset } else { state.nodes[self.node].bytes.len() as u64 };
        let growth = end.saturating_sub(kept);
        let room = state.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(state.used()));
        let mut len = bytes.len() - usize::try_from(growth.saturating_sub(room)).unwrap_or(0).min(bytes.len());
        if fault == Some(Fault::Short) {
            len = len.min(bytes.len() / 2);
        }
        if len == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        state.nodes[self.node].write(&bytes[..len], offset as usize);
        if fault == Some(Fault::Late) { Err(io::Error::other("injected EIO")) } else { Ok(len) }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.fs.state();
        state.enter(Call::Change)?;
        if state.set_len_fails {
            return Err(io::Error::other("injected EIO"));
        }
        state.nodes[self.node].set_len(len as usize);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.fs.state();
        if let Err(error) = state.enter(Call::Change) {
            // A process that is dead has not even asked.
            if !state.is_off() {
                state.nodes[self.node].fail_sync();
            }
            return Err(error);
        }
        state.syncs += 1;
        state.nodes[self.node].sync();
        if !state.names.values().any(|node| *node == self.node) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(())
    }

    fn try_lock(&self) -> io::Result<bool> {
        let taken = self.fs.state().locked.insert(self.node);
        *self.locked.lock().unwrap_or_else(PoisonError::into_inner) |= taken;
        Ok(taken)
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let mut state = self.fs.state();
        if *self.locked.lock().unwrap_or_else(PoisonError::into_inner) {
            state.locked.remove(&self.node);
        }
        if let Some(count) = state.open.get_mut(&self.node) {
            *count -= 1;
        }
        state.open.retain(|_, count| *count > 0);
    }
}

fn is_root(path: &Path) -> bool {
    path.as_os_str().is_empty() || path == Path::new("/")
}

fn sector_of(bytes: &[u8], sector: usize) -> Vec<u8> {
    let start = bytes.len().min(sector * SECTOR);
    let mut version = bytes[start..bytes.len().min(start + SECTOR)].to_vec();
    version.resize(SECTOR, 0);
    version
}
