//! Health and figures: for load balancers, Kubernetes and Prometheus.

use std::fmt;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use http::{HeaderValue, Request, StatusCode};
use nkv_core::{Histogram, HistogramReading};
use nkv_node::{EngineNumber, Figures, Stats};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use crate::body::{Answer, Body, full};
use crate::go_kv;
use crate::problem::Problem;
use crate::route::{Ctx, only_get, query};

/// In a second.
const MICROS: f64 = 1e6;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What requests are about, as figures have it.
pub(crate) const ROUTES: [&str; 8] = ["kv", "list", "batch", "watch", "ws", "kv_store", "go_kv", "other"];

/// No status is greater.
const STATUS_MAX: usize = 600;

/// What a door counts.
#[derive(Debug)]
pub(crate) struct Counted {
    times: [Histogram; ROUTES.len()],
    /// By status.
    answers: [AtomicU64; STATUS_MAX],
    pub(crate) connections: AtomicU64,
}

impl Default for Counted {
    fn default() -> Self {
        Counted {
            times: std::array::from_fn(|_| Histogram::new(Histogram::TIMES)),
            answers: std::array::from_fn(|_| AtomicU64::new(0)),
            connections: AtomicU64::new(0),
        }
    }
}

impl Counted {
    /// A request was answered, but for its body.
    pub(crate) fn answered(&self, path: &str, time: Duration, status: StatusCode) {
        if let Some(times) = self.times.get(route_of(path)) {
            times.observe_time(time);
        }
        if let Some(answers) = self.answers.get(usize::from(status.as_u16())) {
            answers.fetch_add(1, Relaxed);
        }
    }
}

fn route_of(path: &str) -> usize {
    match path {
        "/v1/kv" => 1,
        "/v1/batch" => 2,
        "/v1/watch" => 3,
        "/v1/ws" => 4,
        "/get" | "/getall" | "/set" | "/subscribe" => 5,
        path if path.starts_with("/v1/kv/") => 0,
        path if path.starts_with(go_kv::SERVICE) => 6,
        _ => 7,
    }
}

/// Answers what asks for health or figures.
pub(crate) async fn route<B>(ctx: Ctx<'_>, path: &str, request: &Request<B>) -> Option<Result<Answer, Problem>> {
    Some(match path {
        "/livez" => only_get(request).map(|()| plain("ok\n".into())),
        "/readyz" | "/healthz" => ready(ctx, request),
        "/metrics" => metrics(ctx, request).await,
        _ => return None,
    })
}

/// Whether requests are served. With `verbose`, each part by itself.
fn ready<B>(ctx: Ctx<'_>, request: &Request<B>) -> Result<Answer, Problem> {
    only_get(request)?;
    let is_verbose = query(request, &["verbose"])?.flag("verbose", false)?;
    let stale = ctx.door.handle.stale_text();
    // Readers of a node whose engine is away are served from the last state, and have no better node to go to.
    let healthy = ctx.door.handle.check_readable();
    if !is_verbose {
        healthy.map_err(|error| Problem::new("unavailable", error.to_string()))?;
        return Ok(plain(stale.unwrap_or_else(|| "ok".into()) + "\n"));
    }
    let words = ctx.door.handle.words().unwrap_or_default();
    let durability = words.iter().find(|(name, _)| name == "durability").map_or("", |(_, word)| word);
    let mut answer = match &healthy {
        Ok(()) => {
            let engine = stale.map(|stale| format!("[!]engine {stale}\n")).unwrap_or_default();
            plain(format!("[+]node ok\n[+]storage ok ({durability})\n{engine}ok\n"))
        }
        Err(error) => plain(format!("[-]node failed: {error}\nnot ready\n")),
    };
    if healthy.is_err() {
        *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    Ok(answer)
}

fn plain(text: String) -> Answer {
    let mut answer = Answer::new(full(text));
    let headers = answer.headers_mut();
    headers.insert("content-type", HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert("cache-control", HeaderValue::from_static("no-store"));
    answer
}

async fn metrics<B>(ctx: Ctx<'_>, request: &Request<B>) -> Result<Answer, Problem> {
    only_get(request)?;
    let stats = ctx.door.handle.stats().await?;
    let figures = ctx.door.handle.figures()?.unwrap_or_default();
    let engine = ctx.door.handle.engine_numbers()?;
    let counted = ctx.door.counted.read();
    let mut registry = Registry::with_prefix("nkv");
    registry.register_collector(Box::new(Scrape { stats, figures, engine, counted, process: Process::read() }));
    let mut out = String::new();
    text::encode(&mut out, &registry).map_err(|error| Problem::new("internal", error.to_string()))?;
    let mut answer = Answer::new(Body::counted(out.into(), ctx.conn));
    let headers = answer.headers_mut();
    headers.insert("content-type", HeaderValue::from_static(OPEN_METRICS));
    headers.insert("cache-control", HeaderValue::from_static("no-store"));
    Ok(answer)
}

/// What a door has counted.
#[derive(Debug)]
struct CountedReading {
    times: Vec<(&'static str, HistogramReading)>,
    answers: Vec<(usize, u64)>,
    connections: u64,
}

impl Counted {
    fn read(&self) -> CountedReading {
        let answers = self.answers.iter().map(|count| count.load(Relaxed)).enumerate();
        CountedReading {
            times: ROUTES.into_iter().zip(self.times.iter().map(Histogram::read)).collect(),
            answers: answers.filter(|(_, count)| *count > 0).collect(),
            connections: self.connections.load(Relaxed),
        }
    }
}

/// What the system says of this process; 0 where it says nothing.
#[derive(Debug, Default)]
struct Process {
    resident_bytes: u64,
    open_fds: u64,
}

impl Process {
    fn read() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes =
            resident.and_then(|text| text.split_whitespace().next()).and_then(|text| text.parse::<u64>().ok());
        let open_fds = fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64);
        Process { resident_bytes: kilobytes.unwrap_or(0).saturating_mul(1_024), open_fds }
    }
}

/// All figures, of one moment.
#[derive(Debug)]
struct Scrape {
    stats: Stats,
    figures: Figures,
    engine: Vec<EngineNumber>,
    counted: CountedReading,
    process: Process,
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Out(&mut encoder);
        let Scrape { stats, figures, engine, counted, process } = self;
        out.info("build", "The version that runs.", &[("version", env!("CARGO_PKG_VERSION"))])?;
        out.info(
            "durability",
            "What an acknowledged write has reached.",
            &[("durability", stats.durability.as_str())],
        )?;
        out.gauge("uptime", "For how long the node has been running.", Some(Unit::Seconds), stats.uptime.as_secs())?;
        out.gauge("keys", "Keys that there are.", None, stats.keys)?;
        out.gauge("value", "Bytes of all values.", Some(Unit::Bytes), stats.value_bytes)?;
        out.gauge("revision", "The number of the newest change.", None, stats.revision)?;
        out.gauge("subscriptions", "Subscriptions that there are.", None, stats.subscriptions)?;
        let other = stats.connections.saturating_sub(counted.connections);
        let connections = [("http", counted.connections), ("other", other)];
        let connections = connections.map(|(door, count)| ([("door", door)], count));
        out.gauges(
            "connections",
            "Connections, by the door; 'other' are JSON lines, WebSockets and gRPC.",
            &connections,
        )?;
        out.gauge(
            "queued",
            "What is held for peers: requests, answers and changes that wait.",
            Some(Unit::Bytes),
            figures.queued_bytes,
        )?;
        out.counter("expired", "Keys whose time to live has ended.", stats.expired)?;
        out.counter("events_sent", "Notifications given to subscribers.", stats.notified)?;
        out.counter("events_conflated", "Changes that gave way to newer ones before they were sent.", stats.conflated)?;
        out.counter("batches", "Batches stored.", stats.batches)?;
        out.counter("batches_failed", "Batches that could not be stored.", stats.failed_batches)?;
        let requests = figures.requests.iter().map(|(operation, ended, count)| {
            ([("operation", operation.as_str()), ("outcome", ended.as_str())], *count)
        });
        let help =
            "Requests by what was asked and what became of it, through all doors; a list counts once for 1,024 keys.";
        out.counters("requests", help, &requests.collect::<Vec<_>>())?;
        let help = "From the handing over of writes, one or several of a door, until they were answered.";
        out.times("write_duration", help, &figures.write_times)?;
        out.times(
            "commit_duration",
            "Until a batch was stored and its subscribers were notified.",
            &figures.commit_times,
        )?;
        out.sizes("batch_size", "Writes of a batch.", &figures.batch_sizes)?;
        if let Some(storage) = &figures.storage {
            out.times("storage_sync_duration", "How long syncs of storage took.", &storage.sync_times)?;
            out.gauge("storage_disk", "What storage takes of the disk.", Some(Unit::Bytes), storage.disk_bytes)?;
            out.gauge("storage_live", "What of that is needed.", Some(Unit::Bytes), storage.live_bytes)?;
            out.counter("storage_compactions", "Parts of storage that were compacted.", storage.compactions)?;
            out.counter("storage_compacted_bytes", "Bytes that compaction has written.", storage.compacted_bytes)?;
        }
        engine.iter().try_for_each(|number| out.gauge(number.name, number.help, None, number.value))?;
        let answers: Vec<_> = counted.answers.iter().map(|(status, count)| (status.to_string(), *count)).collect();
        let answers: Vec<_> = answers.iter().map(|(status, count)| ([("code", status.as_str())], *count)).collect();
        out.counters("http_responses", "Answers of the HTTP door, by status.", &answers)?;
        out.all_times("http_request_duration", "Until a request was answered, but for its body.", &counted.times)?;
        out.gauge(
            "process_resident_memory",
            "What the process has in memory.",
            Some(Unit::Bytes),
            process.resident_bytes,
        )?;
        out.gauge("process_open_fds", "Files and sockets that are open.", None, process.open_fds)
    }
}

/// Writes metrics, each with its description.
struct Out<'a, 'b>(&'a mut DescriptorEncoder<'b>);

impl Out<'_, '_> {
    fn begin<'s>(
        &'s mut self,
        name: &'s str,
        help: &str,
        unit: Option<&'s Unit>,
        kind: MetricType,
    ) -> Result<MetricEncoder<'s>, fmt::Error> {
        // The library ends it with a full stop.
        self.0.encode_descriptor(name, help, unit, kind)
    }

    fn info(&mut self, name: &str, help: &str, labels: &[(&str, &str)]) -> fmt::Result {
        let labels: Vec<(String, String)> =
            labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        self.begin(name, help, None, MetricType::Info)?.encode_info(&labels)
    }

    fn gauge(&mut self, name: &str, help: &str, unit: Option<Unit>, value: u64) -> fmt::Result {
        self.begin(name, help, unit.as_ref(), MetricType::Gauge)?.encode_gauge(&signed(value))
    }

    fn gauges<const N: usize>(&mut self, name: &str, help: &str, values: &[([(&str, &str); N], u64)]) -> fmt::Result {
        let mut encoder = self.begin(name, help, None, MetricType::Gauge)?;
        values.iter().try_for_each(|(labels, value)| encoder.encode_family(labels)?.encode_gauge(&signed(*value)))
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.begin(name, help, None, MetricType::Counter)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    fn counters<const N: usize>(&mut self, name: &str, help: &str, values: &[([(&str, &str); N], u64)]) -> fmt::Result {
        let mut encoder = self.begin(name, help, None, MetricType::Counter)?;
        let mut one = |labels: &[(&str, &str); N], value: &u64| {
            encoder.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(value, None)
        };
        values.iter().try_for_each(|(labels, value)| one(labels, value))
    }

    fn times(&mut self, name: &str, help: &str, reading: &HistogramReading) -> fmt::Result {
        histogram(self.begin(name, help, Some(&Unit::Seconds), MetricType::Histogram)?, reading, MICROS)
    }

    fn all_times(&mut self, name: &str, help: &str, all: &[(&str, HistogramReading)]) -> fmt::Result {
        let mut encoder = self.begin(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        let mut one = |route: &str, reading| histogram(encoder.encode_family(&[("route", route)])?, reading, MICROS);
        all.iter().try_for_each(|(route, reading)| one(route, reading))
    }

    fn sizes(&mut self, name: &str, help: &str, reading: &HistogramReading) -> fmt::Result {
        histogram(self.begin(name, help, None, MetricType::Histogram)?, reading, 1.0)
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn histogram(mut encoder: MetricEncoder<'_>, reading: &HistogramReading, unit: f64) -> fmt::Result {
    let bound = |bound: u64| if bound == u64::MAX { f64::INFINITY } else { bound as f64 / unit };
    let buckets: Vec<(f64, u64)> = reading.counts.iter().map(|(at, count)| (bound(*at), *count)).collect();
    encoder.encode_histogram::<NoLabelSet>(reading.sum as f64 / unit, reading.count(), &buckets, None)
}
