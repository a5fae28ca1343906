//! What a client holds of a message, counted in the allocator: a small multiple of the message, whatever a peer wrote.
//!
//! A line of 79 MiB took 1.5 GiB: an empty list of three bytes became a value of 24, and was there twice.

#![cfg(not(miri))]
#![allow(clippy::unwrap_used)]

use std::fmt::Write;

use nkv_protocol::{Message, MessageDecoder, MessageError};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

const LEN: usize = 256 << 10;
/// Of a message's length; memory that is moved counts twice while it is.
const TIMES: usize = 4;
const BESIDES: usize = 128 << 10;

/// The most that was held while the message was read, and the message.
fn read(input: &[u8]) -> (usize, Result<Message, MessageError>) {
    let before = ALLOCATED.current_usage();
    ALLOCATED.reset_peak_usage();
    let read = MessageDecoder::new().decode(input);
    let peak = ALLOCATED.peak_usage() - before;
    (peak, read.map(|(_, message)| message.expect("it is whole")))
}

/// A line with as many elements as go into its length.
fn line(start: &str, element: &str, end: &str) -> Vec<u8> {
    let count = (LEN - start.len() - end.len()) / (element.len() + 1);
    let mut line = Vec::with_capacity(LEN + 1);
    line.extend_from_slice(start.as_bytes());
    (0..count).for_each(|_| line.extend_from_slice(format!("{element},").as_bytes()));
    line.pop();
    line.extend_from_slice(format!("{end}\n").as_bytes());
    line
}

const ANSWER: &str = r#""id":1,"status":200,"message":"No Error""#;

/// One test: the figures are those of the whole process.
#[test]
fn a_message_takes_four_times_its_length_at_most() {
    let mut worst = (0, String::new());
    let mut check = |what: &str, input: &[u8]| {
        let (peak, read) = read(input);
        drop(read);
        let hundredths = peak * 100 / input.len();
        assert!(peak <= TIMES * input.len() + BESIDES, "{what}: {hundredths} hundredths of its length");
        worst = worst.clone().max((hundredths, what.to_owned()));
    };

    for (list, elements) in [
        ("data", &["[]", "\"\"", "[0]", "\"x\"", r#""\n""#, "[255,255,255,255]", "\"twelve bytes\"", "null"][..]),
        ("keys", &["\"\"", "\"k\"", r#""\u00e9""#, "[]", "null"]),
        ("revisions", &["0", "\"\"", "[]", "1234567", "null"]),
        ("lens", &["0", "\"\"", "18446744073709551615"]),
        ("features", &["\"\"", "\"reset\"", r#""\u00e9""#]),
        (
            "subscribers",
            &[
                r#"{"client_uuid":"","pattern":"","since_ms":0,"queued":0,"skipped":0}"#,
                r#"{"client_uuid":"c","pattern":"a","since_ms":0,"queued":0,"skipped":0,"name":"n","peer":"p"}"#,
                r#"["","",false,0,0,0,null,null]"#,
                "{}",
                "[]",
                "\"\"",
            ],
        ),
        (
            "clients",
            &[
                r#"{"peer":"","since_ms":0,"subscriptions":0,"queued":0,"skipped":0}"#,
                r#"{"peer":"p","client_uuid":"","name":"","since_ms":0,"subscriptions":0,"queued":0,"skipped":0}"#,
                r#"["",null,null,0,0,0,0]"#,
                "{}",
                "[]",
                "\"\"",
            ],
        ),
        ("later", &["[]", "{}", "\"\"", r#"{"a":[]}"#]),
    ] {
        for element in elements {
            for kind in ["Get", "List", "Base", "Trace", "Stats"] {
                let input = line(&format!("{{\"{kind}\":{{{ANSWER},\"{list}\":["), element, "]}}");
                check(&format!("{kind} with {list} of {element}"), &input);
            }
        }
    }
    // Lists that agree, and a payload of nothing.
    let count = LEN / 8;
    let list = |element: &str| vec![element; count].join(",");
    for (values, keys, payload) in [
        (format!("\"lens\":[{}],\"len\":0", list("0")), "\"\"", "\n"),
        (format!("\"data\":[{}]", list("[]")), "\"\"", ""),
        (format!("\"data\":[{}]", list("\"v\"")), "\"k\"", ""),
    ] {
        let (keys, revisions) = (list(keys), list("0"));
        let input =
            format!("{{\"Get\":{{{ANSWER},{values},\"keys\":[{keys}],\"revisions\":[{revisions}]}}}}\n{payload}");
        let (_, message) = read(input.as_bytes());
        let Ok(Message::Answer(body)) = message else { panic!("no answer") };
        assert_eq!((body.keys.len(), body.revisions.len(), body.values.len()), (count, count, count));
        drop(body);
        check("agreeing lists", input.as_bytes());
    }
    // Long texts in every place, those that must not be there too: an error quotes them, escaped.
    for text in ["\u{7f}".repeat(LEN), r"\\".repeat(LEN / 2)] {
        for field in FIELDS {
            for kind in ["Get", "Stats", "Update", "Close", "Synced"] {
                let input = format!("{{\"{kind}\":{{\"{field}\":\"{text}\"}}}}\n");
                check(&format!("a text as {field} of {kind}"), input.as_bytes());
            }
            let input = format!("{{\"Get\":{{{ANSWER},\"{field}\":[\"{text}\"]}}}}\n");
            check(&format!("a text among {field}"), input.as_bytes());
        }
        for kind in KINDS {
            check(&format!("a text as {kind}"), format!("{{\"{kind}\":\"{text}\"}}\n").as_bytes());
        }
        for field in ["client_uuid", "pattern", "exact", "since_ms", "queued", "skipped", "name", "peer"] {
            let input = format!("{{\"Trace\":{{{ANSWER},\"subscribers\":[{{\"{field}\":\"{text}\"}}]}}}}\n");
            check(&format!("a text as {field} of a subscriber"), input.as_bytes());
        }
        for field in ["peer", "client_uuid", "name", "since_ms", "subscriptions", "queued", "skipped"] {
            let input = format!("{{\"Trace\":{{{ANSWER},\"clients\":[{{\"{field}\":\"{text}\"}}]}}}}\n");
            check(&format!("a text as {field} of a client"), input.as_bytes());
        }
        check("a text in a message of a later version", format!("{{\"Moved\":\"{text}\"}}\n").as_bytes());
        let moved = format!("{{\"Moved\":{{\"len\":\"{text}\"}}}}\n");
        check("a text as the length in a message of a later version", moved.as_bytes());
        check("a text as a kind", format!("{{\"{text}\":{{}}}}\n").as_bytes());
        check("a text alone", format!("\"{text}\"\n").as_bytes());
        check("a text as a field", format!("{{\"Base\":{{\"{text}\":0}}}}\n").as_bytes());
        let close = format!("{{\"Close\":{{\"key\":\"a\",\"reason\":\"{text}\"}}}}\n");
        check("a text as a reason", close.as_bytes());
    }
    // A great many figures, and changes with long values in each form.
    let mut input = String::from("{\"Stats\":{\"id\":1,\"status\":200,\"message\":\"No Error\"");
    (0..LEN / 10).for_each(|n| write!(input, ",\"{n:x}\":0").unwrap());
    check("figures", (input + "}}\n").as_bytes());
    check("an update", &line("{\"Update\":{\"key\":\"a\",\"revision\":1,\"value\":[", "0", "]}}"));
    let payload = format!("{{\"Update\":{{\"key\":\"a\",\"revision\":1,\"len\":{LEN}}}}}\n{}\n", "x".repeat(LEN));
    check("an update with a payload", payload.as_bytes());

    println!("TEST message_memory hundredths_of_its_length_max={} len={LEN} by={}", worst.0, worst.1);
}

const KINDS: [&str; 13] = [
    "Hello", "Alive", "Base", "Get", "List", "Trace", "Version", "Stats", "Update", "Close", "Reset", "Synced", "Stale",
];

const FIELDS: [&str; 27] = [
    "id",
    "status",
    "message",
    "revision",
    "count",
    "keys",
    "revisions",
    "data",
    "lens",
    "len",
    "more",
    "subscribers",
    "clients",
    "version",
    "protocol",
    "epoch",
    "max_value",
    "features",
    "patience_ms",
    "since_ms",
    "key",
    "value",
    "skipped",
    "reason",
    "name",
    "peer",
    "later",
];
