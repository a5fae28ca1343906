//! The decoder over input cut anywhere, limits, and what becomes of bad input.

#![allow(clippy::unwrap_used)]

use bytes::{Bytes, BytesMut};
use nkv_protocol::{
    Answer, BaseFields, ChangeNotice, Chunks, ClientFields, ConnectedClient, Decoder, Entries, Features, GetEntry,
    Kind, Limits, Message, MessageDecoder, MessageError, Reason, Request, ServerFields, SubscriberFields, ValueForm,
    alive, stale, status,
};
use proptest::prelude::*;

/// What a decoder makes of input that arrives in pieces: requests in short, refusals as `id status close`.
fn decode(input: &[u8], piece_len: usize, limits: Limits) -> Vec<String> {
    let mut decoder = Decoder::new(limits);
    let (mut buffer, mut seen) = (Vec::new(), Vec::new());
    for piece in input.chunks(piece_len) {
        buffer.extend_from_slice(piece);
        loop {
            let decoded = decoder.decode(&buffer);
            let consumed = decoded.consumed;
            let more = match decoded.item {
                Some(Ok(request)) => {
                    let value = request.value.as_deref().map(String::from_utf8_lossy);
                    seen.push(format!("{:?} {:?} {} {value:?}", request.kind, request.id, request.key));
                    true
                }
                Some(Err(refusal)) => {
                    seen.push(format!("{:?} {} close={}", refusal.id, refusal.status, refusal.close));
                    if refusal.close {
                        return seen;
                    }
                    true
                }
                None => false,
            };
            buffer.drain(..consumed);
            if !more {
                break;
            }
        }
    }
    seen
}

fn message(line: &[u8]) -> Message {
    let (consumed, message) = MessageDecoder::new().decode(line).unwrap();
    assert_eq!(consumed, line.len());
    message.unwrap()
}

fn update(line: &[u8]) -> (String, Bytes, u64, u64) {
    let Message::Update { key, value, revision, skipped, .. } = message(line) else { panic!("no update") };
    (key, value, revision, skipped)
}

const MIXED: &[u8] = b"{\"type\":\"Put\",\"id\":\"1\",\"key\":\"a\",\"len\":5}\nh\n{}i\n\r\n\n\
    {\"type\":\"Put\",\"id\":2,\"key\":\"a.b\",\"value\":[104,105]}\r\n\
    {\"value\":\"h\\u00e9\",\"type\":\"Put\",\"key\":\"c\",\"extra\":{\"x\":[1,{}]}}\n\
    {\"type\":\"Get\",\"id\":\"9\",\"key\":\"*\",\"len\":3}\nxyz\n\
    {\"type\":\"Nope\",\"id\":\"5\",\"len\":2}\n{}\n\
    {\"id\":\"6\",\"type\":\"Put\",\"key\":\"a\",\"value\":[300]}\n\
    not json\n\
    {\"type\":\"Health\"}\n";

#[test]
fn requests_are_the_same_however_the_input_is_cut() {
    let whole = decode(MIXED, MIXED.len(), Limits::default());
    assert_eq!(
        whole,
        [
            "Put \"1\" a Some(\"h\\n{}i\")",
            "Put 2 a.b Some(\"hi\")",
            "Put \"\" c Some(\"hé\")",
            "Get \"9\" * None",
            "\"5\" 400 close=false",
            "\"6\" 400 close=false",
            "\"\" 400 close=false",
            "Health \"\"  None",
        ]
    );
    for piece_len in (1..40).step_by(if cfg!(miri) { 13 } else { 1 }) {
        assert_eq!(decode(MIXED, piece_len, Limits::default()), whole, "pieces of {piece_len}");
    }
}

#[test]
fn a_value_at_the_limit_passes_and_one_byte_more_is_refused_and_read_past() {
    let limits = Limits { value_len_max: 4, skip_len_max: 100 };
    let input = b"{\"type\":\"Put\",\"id\":1,\"key\":\"a\",\"len\":4}\n1234\n\
        {\"type\":\"Put\",\"id\":2,\"key\":\"a\",\"len\":5}\n12345\n\
        {\"type\":\"Put\",\"id\":3,\"key\":\"a\",\"value\":[1,2,3,4,5]}\n\
        {\"type\":\"Put\",\"id\":4,\"key\":\"a\",\"value\":\"12345\"}\n\
        {\"type\":\"Put\",\"id\":5,\"key\":\"a\",\"value\":\"1234\"}\n\
        {\"type\":\"Put\",\"id\":6,\"key\":\"a\",\"len\":101}\n";
    let expected = [
        "Put 1 a Some(\"1234\")",
        "2 413 close=false",
        "3 413 close=false",
        "4 413 close=false",
        "Put 5 a Some(\"1234\")",
        "6 413 close=true",
    ];
    for piece_len in [1, 7, input.len()] {
        assert_eq!(decode(input, piece_len, limits), expected);
    }
}

#[test]
#[cfg_attr(miri, ignore = "lines of 32 KiB are only slow")]
fn a_line_without_end_is_refused_at_the_limit() {
    let limits = Limits { value_len_max: 4, skip_len_max: 100 };
    let input = vec![b'a'; limits.line_len_max() + 1];
    assert_eq!(decode(&input, 1_000, limits), ["\"\" 413 close=true"]);
    assert!(decode(&input[1..], 1_000, limits).is_empty());
    let whole = [&input[..], b"\n{\"type\":\"Health\"}\n"].concat();
    assert_eq!(decode(&whole, whole.len(), limits), ["\"\" 413 close=true"], "also when its end is there");
}

/// White space around a line counted when it came in pieces, and did not when the line came whole.
#[test]
#[cfg_attr(miri, ignore = "lines of 32 KiB are only slow")]
fn a_line_at_the_limit_is_the_same_however_it_is_cut() {
    let limits = Limits { value_len_max: 4, skip_len_max: 100 };
    for spare in [0, 1] {
        let mut input = vec![b' '; limits.line_len_max() + spare];
        let end = b"{\"type\":\"Health\"}\n";
        let start = input.len() - end.len();
        input[start..].copy_from_slice(end);
        let expected = ["Health \"\"  None", "\"\" 413 close=true"][spare];
        assert_eq!(decode(&input, 1_000, limits), [expected]);
        assert_eq!(decode(&input, input.len(), limits), [expected]);
    }
}

#[test]
fn a_payload_without_newline_ends_the_connection() {
    let input = b"{\"type\":\"Put\",\"id\":\"1\",\"key\":\"a\",\"len\":2}\nhixx";
    assert_eq!(decode(input, 1, Limits::default()), ["\"1\" 400 close=true"]);
}

#[test]
fn what_is_wrong_is_named() {
    let cases = [
        ("{\"key\":\"a\"}", "missing field 'type'"),
        ("{\"type\":\"Get\"}", "missing field 'key'"),
        ("{\"type\":\"Put\",\"key\":\"a\"}", "missing field 'value'"),
        ("{\"type\":\"Put\",\"key\":\"a\",\"key\":\"b\"}", "field 'key' given twice"),
        ("{\"type\":\"Put\",\"key\":\"a\",\"value\":\"\",\"ttl_ms\":0}", "'ttl_ms' must be at least 1"),
        ("{\"type\":\"List\",\"key\":\"*\",\"limit\":0}", "'limit' must be at least 1"),
        ("{\"type\":\"Grab\"}", "unknown type 'Grab'"),
        ("{\"type\":\"Get\",\"id\":{}}", "'id' must be a string or a number"),
        ("{\"type\":\"Get\",\"key\":7}", "column 21"),
        ("{\"type\":\"Get\",\"key\":\"a\",\"ahead\":1}", "expected a boolean"),
        ("{\"type\":\"Subscribe\",\"key\":\"a\",\"exact\":\"yes\"}", "expected a boolean"),
        ("{\"type\":\"Connect\",\"name\":\"a\\u0085b\"}", "'name' must not hold control characters"),
        ("[1]", "a JSON object on one line"),
    ];
    for (line, part) in cases {
        let input = format!("{line}\n");
        let refusal = Decoder::new(Limits::default()).decode(input.as_bytes()).item.unwrap().unwrap_err().message;
        assert!(refusal.contains(part), "{line}: {refusal}");
    }
}

/// A text in the place of a number was quoted whole, each of its bytes as up to seven: 6 MB in, 42 MB out.
#[test]
fn a_refusal_quotes_nothing_that_may_be_long() {
    let text = format!("\"{}\"", "\u{7f}".repeat(100_000));
    let mut lines: Vec<_> = [
        "type",
        "id",
        "key",
        "client_uuid",
        "value",
        "len",
        "if_revision",
        "ttl_ms",
        "limit",
        "after",
        "snapshot",
        "values",
        "token",
    ]
    .map(|field| ["", "[", "{", "{\"a\":", "[["].map(|open| format!("{{\"{field}\":{open}{text}]}}")))
    .concat();
    lines.extend(["len", "limit", "snapshot", "values", "type"].map(|field| format!("{{\"{field}\":{text}}}")));
    lines.extend([
        text.clone(),
        format!("[{text}]"),
        format!("{{{text}:1}}"),
        format!("{{{text}}}"),
        text.replace('"', ""),
    ]);
    lines.push(format!("{{\"type\":\"Put\",\"key\":\"a\",\"value\":[{text}]}}"));
    lines.push(format!("{{\"len\":1{}}}", "0".repeat(100_000)));
    for line in lines {
        let input = format!("{line}\n");
        let refusal = Decoder::new(Limits::default()).decode(input.as_bytes()).item.unwrap().unwrap_err();
        assert!(refusal.message.len() <= 512, "{:.60}: {:.300}", line, refusal.message);
    }
    let error = MessageDecoder::new().decode(format!("{{\"Base\":{{\"status\":{text}}}}}\n").as_bytes()).unwrap_err();
    assert!(error.to_string().len() <= 1_000, "{:.300}", error.to_string());
}

/// What a browser was made to send behind the head of its request was read as requests and done.
#[test]
fn a_stream_of_another_protocol_ends_with_one_answer_and_nothing_in_it_is_read() {
    let put = "{\"type\":\"Put\",\"key\":\"a\",\"value\":\"x\"}\n";
    for start in [
        &b"POST / HTTP/1.1\r\nHost: 127.0.0.1:4222\r\nContent-Type: text/plain\r\n\r\n"[..],
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",
        b"\x16\x03\x03\x00\x0a\x01\n",
        b"*3\r\n$3\r\nSET\r\n",
        b"\0\0\0\x08\x04\xd2\x16\x2f",
    ] {
        let input = [start, put.as_bytes()].concat();
        for piece_len in [1, 2, 7, input.len()] {
            assert_eq!(decode(&input, piece_len, Limits::default()), ["\"\" 400 close=true"], "{piece_len}");
        }
    }
    // A hand-shake holds no newline, as a rule: it is known before one comes.
    let hello = Decoder::new(Limits::default()).decode(b"\x16\x03\x01\x02\x00\x01").item.unwrap().unwrap_err();
    assert!(hello.close && hello.message.contains("TLS"), "{hello:?}");
    // In the middle of a stream too.
    let input = format!("{put}not json\nGET / HTTP/1.1\n{put}");
    let seen = decode(input.as_bytes(), input.len(), Limits::default());
    assert_eq!(seen, ["Put \"\" a Some(\"x\")", "\"\" 400 close=false", "\"\" 400 close=true"]);
}

#[test]
fn deep_nesting_is_refused_without_harm() {
    let depth = if cfg!(miri) { 150 } else { 200_000 };
    let line = format!("{{\"type\":\"Get\",\"key\":\"a\",\"x\":{}\n", "[".repeat(depth));
    assert_eq!(decode(line.as_bytes(), 65_536, Limits::default()), ["\"\" 400 close=false"]);
}

#[test]
fn a_nats_server_is_named_as_such() {
    let error = MessageDecoder::new().decode(b"INFO {\"server_id\":\"x\"}\r\n").unwrap_err();
    assert!(error.to_string().contains("NATS"), "{error}");
}

/// A server of HTTP/2 speaks first, and its first bytes need not hold a newline.
#[test]
fn an_http_server_is_named_as_such() {
    for (input, part) in [
        (
            &b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"[..],
            "an HTTP server; the HTTP port of an nkv server is written ws://",
        ),
        (b"\0\0\x12\x04\0\0\0\0\0\0\x03\0\0\0\x64", "an HTTP/2 server"),
        (b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\n", "an HTTP/2 server"),
    ] {
        let error = MessageDecoder::new().decode(input).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
    assert_eq!(MessageDecoder::new().decode(b"HTTP/1.1 400 Bad").unwrap().1, None, "the line is not there yet");
    assert_eq!(MessageDecoder::new().decode(b"\0\0\x06\x04").unwrap().1, None, "nor is the frame");
}

/// The byte behind a payload was not looked at: a wrong `len` put the reader out of step.
#[test]
fn a_payload_from_the_server_ends_with_a_newline() {
    let line = "{\"Update\":{\"key\":\"a\",\"revision\":1,\"len\":2,\"skipped\":0}}\n";
    assert!(MessageDecoder::new().decode(format!("{line}hi\n").as_bytes()).unwrap().1.is_some());
    let error = MessageDecoder::new().decode(format!("{line}hixx\n").as_bytes()).unwrap_err();
    assert!(error.to_string().contains("no newline"), "{error}");
}

/// A list of one key, at revision 3.
fn list_of(key: &str) -> Entries {
    let mut list = Entries::of_list();
    list.push(GetEntry { key, value: &[], shared: None, revision: 3 });
    list
}

#[test]
fn keys_are_escaped_in_answers() {
    let mut out = Chunks::default();
    Answer::to(Default::default(), &mut out).entries(list_of("a\"\\b\u{1}é"), true);
    let Message::Answer(body) = message(&out.take().concat()) else { panic!("no answer") };
    assert_eq!((Vec::from_iter(body.keys.iter()), &*body.revisions, body.more), (vec!["a\"\\b\u{1}é"], &[3][..], true));
}

#[test]
fn every_character_is_escaped_where_it_must_be_wherever_it_stands() {
    for special in ('\0'..='\u{80}').chain(['é', '\u{2028}', '\u{10ffff}']) {
        // Long enough for every way of looking through it: in bytes, words and blocks.
        for before in (0..150).step_by(if cfg!(miri) { 37 } else { 1 }) {
            let key = format!("{}{special}{}", "x".repeat(before), "y".repeat(150 - before));
            let mut out = Chunks::default();
            Answer::to(Default::default(), &mut out).entries(list_of(&key), true);
            let line = out.take().concat();
            assert_eq!(line.iter().filter(|byte| **byte < b' ').count(), 1, "{special:?}: one line");
            let Message::Answer(body) = message(&line) else { panic!("no answer") };
            assert_eq!(Vec::from_iter(body.keys.iter()), [key]);
        }
    }
}

#[test]
fn long_and_short_values_keep_their_places() {
    let long = |byte: u8, len| Bytes::from(vec![byte; len]);
    let values =
        [long(b'a', 5_000), Bytes::new(), long(b'b', 4_096), long(b'c', 4_095), long(255, 9_000), long(b'd', 1)];
    for places in [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [1, 0, 1, 4, 2, 0], [1, 1, 1, 1, 1, 1]] {
        let values = places.map(|place| values[place].clone());
        let entries: Vec<_> = values.iter().map(|value| ("k", value, 7)).collect();
        for form in [ValueForm::Bytes, ValueForm::Text, ValueForm::Payload] {
            let mut out = Chunks::default();
            Answer::to(Default::default(), &mut out).get(form, &entries, false);
            let Message::Answer(body) = message(&out.take().concat()) else { panic!("no answer") };
            assert_eq!(Vec::from_iter(&body.values), values);
            assert_eq!((body.values.len(), Vec::from_iter(body.keys.iter())), (6, vec!["k"; 6]));
        }
    }
}

#[test]
fn lists_that_run_in_parallel_are_of_one_length_and_of_numbers() {
    let read = |fields: &str, payload: &str| {
        let start = r#"{"Get":{"id":1,"status":200,"message":"No Error""#;
        let line = format!("{start},{fields}}}}}\n{payload}");
        let (_, message) = MessageDecoder::new().decode(line.as_bytes())?;
        let Some(Message::Answer(body)) = message else { panic!("no answer") };
        Ok::<_, MessageError>((body.revisions, Vec::from_iter(&body.values)))
    };
    let values = vec![Bytes::from("x"), Bytes::from("yz")];
    let good = r#""keys":["a","b"],"revisions":[ 1 , 18446744073709551615 ],"lens":[1,2],"len":3"#;
    assert_eq!(read(good, "xyz\n"), Ok((vec![1, u64::MAX], values)));
    assert_eq!(read(r#""keys":null,"revisions":null,"data":null"#, ""), Ok((vec![], vec![])));
    assert_eq!(read(r#""keys":[],"revisions":[ ],"data":[]"#, ""), Ok((vec![], vec![])));
    for (bad, payload) in [
        (good.replace(" 1 ,", ""), "xyz\n"),
        (good.replace("[1,2]", "[1,1,1]"), "xyz\n"),
        (good.replace("[1,2]", "[1,1]"), "xyz\n"),
        (good.replace("[1,2]", "[1,3]"), "xyz\n"),
        (good.replace("[1,2]", "1"), "xyz\n"),
        (good.replace(" 1 ", "1.0"), "xyz\n"),
        (good.replace(" 1 ", "-1"), "xyz\n"),
        (good.replace(" 1 ", "\"1\""), "xyz\n"),
        (good.replace("\"a\"", "7"), "xyz\n"),
        (r#""keys":["a"],"revisions":[1],"data":[[256]]"#.into(), ""),
    ] {
        assert!(matches!(read(&bad, payload), Err(MessageError::Malformed { .. })), "{bad}");
    }
}

#[test]
fn every_byte_is_a_number() {
    let (all, mut out) = (Bytes::from_iter(0..=255), Chunks::default());
    Answer::to(Default::default(), &mut out).get(ValueForm::Bytes, &[("k", &all, 7), ("l", &Bytes::new(), 8)], true);
    let numbers: Vec<_> = all.iter().map(u8::to_string).collect();
    let expected = format!(
        "{{\"Get\":{{\"id\":\"\",\"status\":200,\"message\":\"No Error\",\"data\":[[{}],[]],\"keys\":[\"k\",\"l\"],\
         \"revisions\":[7,8],\"more\":true}}}}\n",
        numbers.join(",")
    );
    assert_eq!(String::from_utf8(out.take().concat()).unwrap(), expected);
}

fn forms() -> impl Strategy<Value = ValueForm> {
    prop_oneof![Just(ValueForm::Bytes), Just(ValueForm::Text), Just(ValueForm::Payload)]
}

fn text(len_max: usize) -> impl Strategy<Value = String> {
    proptest::collection::vec(any::<char>(), 0..=len_max).prop_map(String::from_iter)
}

proptest! {
    #[test]
    fn values_arrive_as_sent_in_every_form(
        values in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 1..4),
        form in forms(),
        skipped in any::<u64>(),
    ) {
        let values: Vec<Bytes> = values.into_iter().map(Bytes::from).collect();
        let entries: Vec<_> = values.iter().map(|value| ("k", value, 7)).collect();
        let mut out = Chunks::default();
        Answer::to(Default::default(), &mut out).get(form, &entries, false);
        let Message::Answer(body) = message(&out.take().concat()) else { panic!("no answer") };
        prop_assert_eq!(&Vec::from_iter(&body.values), &values);

        let mut out = Chunks::default();
        Answer::to(Default::default(), &mut out).get(form, &[("k", &values[0], 7)], false);
        let whole = out.take().concat().len();
        Answer::to(Default::default(), &mut out).get(form, &[("k", &Bytes::new(), 7)], false);
        let empty = out.take().concat().len();
        let digits = |len: usize| len.to_string().len() - 1;
        let lens = if form == ValueForm::Payload { 2 * digits(values[0].len()) } else { 0 };
        prop_assert_eq!(whole - empty, form.len_of(&values[0]) - form.len_of(b"") + lens);

        ChangeNotice::update("k", &values[0], 9, form).write(skipped, &mut out);
        prop_assert_eq!(update(&out.take().concat()), ("k".into(), values[0].clone(), 9, skipped));
    }

    #[test]
    fn a_request_reads_as_it_was_written(
        kind in proptest::sample::select(Kind::ALL),
        key in text(12),
        value in proptest::collection::vec(any::<u8>(), 0..40),
        numbers in proptest::option::of((any::<u64>(), 1u64.., 1u64..)),
        after in proptest::option::of(text(8)),
        (snapshot, ahead, exact) in any::<(bool, bool, bool)>(),
        name in proptest::option::of("[a-zé ]{1,20}"),
        features in prop_oneof![Just(Features::NONE), Just(Features::RESET), Just(Features::ALIVE | Features::AHEAD)],
    ) {
        let mut request = Request::new(kind, if kind == Kind::Health { String::new() } else { key });
        if matches!(kind, Kind::Version | Kind::Stats | Kind::Connect) {
            request.key = "".into();
        }
        request.value = (kind == Kind::Put).then(|| value.into());
        request.after = after.map(Into::into);
        (request.snapshot, request.ahead, request.exact) = (snapshot, ahead, exact);
        request.name = name.map(Into::into);
        request.features = features;
        if let Some((if_revision, ttl_ms, limit)) = numbers {
            (request.if_revision, request.ttl_ms, request.limit) = (Some(if_revision), Some(ttl_ms), Some(limit));
        }
        let mut out = BytesMut::new();
        request.encode(41, &mut out);
        let decoded = Decoder::new(Limits::default()).decode(&out);
        prop_assert_eq!(decoded.consumed, out.len());
        let read = decoded.item.unwrap().unwrap();
        prop_assert_eq!(read.id.as_json(), "41");
        request.id = read.id;
        prop_assert_eq!(read, request);
    }

    #[test]
    fn no_input_breaks_a_decoder(input in proptest::collection::vec(any::<u8>(), 0..400)) {
        decode(&input, 13, Limits::default());
        let _ = MessageDecoder::new().decode(&input);
    }
}

#[test]
fn what_was_skipped_is_reported_with_short_and_with_long_values() {
    for len in [0, 1, 4_095, 4_096, 5_000] {
        for form in [ValueForm::Bytes, ValueForm::Text, ValueForm::Payload] {
            let value = Bytes::from(vec![b'0'; len]);
            let notice = ChangeNotice::update("k", &value, 9, form);
            for skipped in [0, 1, u64::MAX, 0] {
                let mut out = Chunks::default();
                notice.write(skipped, &mut out);
                assert_eq!(update(&out.take().concat()), ("k".into(), value.clone(), 9, skipped));
            }
        }
    }
}

#[test]
fn a_close_says_why() {
    let mut out = Chunks::default();
    ChangeNotice::close("a.b", 42, true).write(3, &mut out);
    let Message::Close { key, reason, revision, skipped, .. } = message(&out.take().concat()) else {
        panic!("no close")
    };
    assert_eq!((key.as_str(), reason, revision, skipped), ("a.b", Reason::Expired, 42, 3));
    Answer::to(Default::default(), &mut out).base(409, "at 5", &BaseFields::revision(5));
    assert_eq!(out.take().concat(), b"{\"Base\":{\"id\":\"\",\"status\":409,\"message\":\"at 5\",\"revision\":5}}\n");
}

/// What a line of a server is read as.
fn read(line: &str) -> Message {
    message(format!("{line}\n").as_bytes())
}

/// A message that a client did not know ended its connection, and the next one, for ever.
#[test]
fn messages_and_reasons_of_later_versions_are_passed_over() {
    for line in [
        r#""Moved""#,
        r#"{"Moved":{"key":"a"}}"#,
        r#"{"Moved":{"key":"a","len":null}}"#,
        r#"{"Moved":[1,{"len":5}]}"#,
        r#"{"M\u006fved":"a"}"#,
        r#"{"Close":{"key":"a","revision":7,"skipped":0,"reason":"moved"}}"#,
        r#"{"Close":{"key":"a","reason":"m\u006fved","to":{"b":1}}}"#,
    ] {
        assert_eq!(read(line), Message::Unknown, "{line}");
    }
    // A payload belongs to the framing of these too.
    let stream = b"{\"Moved\":{\"key\":\"a\",\"len\":9}}\n\"Hello\"\n\n\n\"Hello\"\n";
    assert_eq!(MessageDecoder::new().decode(stream), Ok((stream.len() - 8, Some(Message::Unknown))));
    assert_eq!(MessageDecoder::new().decode(&stream[..30]).unwrap().1, None);
}

#[test]
fn what_is_no_message_is_none_of_a_later_version_either() {
    for line in [
        "{}",
        "[]",
        "7",
        "null",
        "Moved",
        r#"{"Moved":{}"#,
        r#"{"Moved":{},"Hello":{}}"#,
        r#"{"Update":{"key":"a"}}"#,
        r#"{"Base":{"id":1}}"#,
        r#"{"Close":{"reason":"moved"}}"#,
        r#""Base""#,
        r#"{"Hello":{"len":3}}"#,
    ] {
        let decoded = MessageDecoder::new().decode(format!("{line}\n").as_bytes());
        assert!(matches!(decoded, Err(MessageError::Malformed { .. })), "{line}: {decoded:?}");
    }
}

#[test]
fn a_name_is_bounded() {
    let name = |name: &str| {
        let line = format!("{{\"type\":\"Connect\",\"name\":\"{name}\"}}\n");
        let decoded = Decoder::new(Limits::default()).decode(line.as_bytes()).item.unwrap();
        let read = decoded.map(|request| request.name.map(|name| name.into_owned()));
        read.map_err(|refusal| (refusal.status, refusal.message))
    };
    assert_eq!((name(&"é".repeat(128)), name("")), (Ok(Some("é".repeat(128))), Ok(None)));
    assert_eq!(name(&"x".repeat(257)), Err((status::TOO_LARGE, "name over the limit of 256 bytes".into())));
}

#[test]
fn clients_read_what_features_add_to_answers() {
    let mut out = Chunks::default();
    alive(&mut out);
    assert_eq!(message(&out.take().concat()), Message::Alive);
    for since_ms in [None, Some(0), Some(u64::MAX)] {
        stale(since_ms, &mut out);
        let read = message(&out.take().concat());
        assert!(matches!(read, Message::Stale { since_ms: read, .. } if read == since_ms), "{read:?}");
    }

    let mut server = ServerFields::new("1", "e", 9);
    server.patience_ms = Some(40_000);
    Answer::to(Default::default(), &mut out).ok(&BaseFields::server(server));
    let Message::Answer(body) = message(&out.take().concat()) else { panic!("no answer") };
    assert_eq!(body.patience_ms, Some(40_000));

    let plain = SubscriberFields::new("c1", "a");
    let mut named = SubscriberFields::new("c2", "a.*");
    (named.name, named.peer) = (Some("the \"lamp\""), Some("unix"));
    Answer::to(Default::default(), &mut out).trace(&[plain, named]);
    let Message::Answer(body) = message(&out.take().concat()) else { panic!("no answer") };
    let shown: Vec<_> = body.subscribers.iter().map(|one| (one.name.as_deref(), one.peer.as_deref())).collect();
    assert_eq!(shown, [(None, None), (Some("the \"lamp\""), Some("unix"))]);

    let silent = ClientFields::new("unix");
    let mut client = ClientFields::new("[::1]:5");
    (client.client_uuid, client.name) = (Some("c1"), Some("lamp"));
    (client.since_ms, client.subscriptions, client.queued, client.skipped) = (1, 2, 3, 4);
    Answer::to(Default::default(), &mut out).clients(&[silent, client]);
    let Message::Answer(body) = message(&out.take().concat()) else { panic!("no answer") };
    let ConnectedClient { peer, client_uuid, name, since_ms, subscriptions, queued, skipped, .. } = &body.clients[1];
    assert_eq!((body.clients.len(), peer.as_str(), client_uuid.as_deref()), (2, "[::1]:5", Some("c1")));
    assert_eq!((name.as_deref(), *since_ms, *subscriptions, *queued, *skipped), (Some("lamp"), 1, 2, 3, 4));
    assert_eq!((body.clients[0].client_uuid.as_deref(), body.clients[0].name.as_deref()), (None, None));
}

/// What a `Connect` with this list understands, or its refusal.
fn features(list: &str) -> Result<Features, (u16, String)> {
    let line = format!("{{\"type\":\"Connect\",\"features\":{list}}}\n");
    let decoded = Decoder::new(Limits::default()).decode(line.as_bytes()).item.unwrap();
    decoded.map(|request| request.features).map_err(|refusal| (refusal.status, refusal.message))
}

#[test]
fn a_list_of_features_is_read_for_the_names_that_are_known() {
    assert_eq!(Request::new(Kind::Connect, "").features, Features::NONE);
    for (list, expected) in [
        ("null", Features::NONE),
        ("[]", Features::NONE),
        ("[\"reset\"]", Features::RESET),
        ("[ \"of-a-later-version\", \"reset\", \"reset\", \"\" ]", Features::RESET),
        ("[\"\\u0072eset\"]", Features::RESET),
        ("[\"Reset\"]", Features::NONE),
    ] {
        assert_eq!(features(list), Ok(expected), "{list}");
    }
    for list in ["\"reset\"", "{}", "[1]", "[null]", "[\"reset\"],\"features\":[\"reset\"]"] {
        assert_eq!(features(list).map_err(|(status, _)| status), Err(status::BAD_REQUEST), "{list}");
    }
}

#[test]
fn a_list_of_features_is_bounded() {
    // Brackets and quotation marks take four of the bytes.
    assert_eq!(features(&format!("[\"{}\"]", "x".repeat(4_092))), Ok(Features::NONE));
    let (status, message) = features(&format!("[\"{}\"]", "x".repeat(4_093))).unwrap_err();
    assert_eq!((status, message.as_str()), (status::TOO_LARGE, "features over the limit of 4096 bytes"));
}

#[test]
fn a_server_says_what_it_offers() {
    for (offered, text) in [(Features::NONE, "[]"), (Features::RESET, "[\"reset\"]")] {
        let mut server = ServerFields::new("1", "e", 9);
        server.features = offered;
        let mut out = Chunks::default();
        Answer::to(Default::default(), &mut out).ok(&BaseFields::server(server));
        let line = out.take().concat();
        assert!(String::from_utf8_lossy(&line).contains(&format!(",\"features\":{text}")));
        let Message::Answer(body) = message(&line) else { panic!("no answer") };
        assert_eq!(body.features, offered);
    }
    let older = b"{\"Base\":{\"id\":0,\"status\":200,\"message\":\"No Error\",\"max_value\":9}}\n";
    let later = b"{\"Base\":{\"id\":0,\"status\":200,\"message\":\"\",\"features\":[\"of-a-later-version\"]}}\n";
    for line in [&older[..], later] {
        let Message::Answer(body) = message(line) else { panic!("no answer") };
        assert_eq!(body.features, Features::NONE);
    }
}

/// The length of a payload is found in a line wherever it stands, and nothing else is taken for it.
#[test]
fn the_length_of_a_payload_is_found_wherever_it_stands() {
    let rest = r#""id":1,"status":200,"message":"","keys":["a"],"revisions":[1],"lens":[3]"#;
    let lines = [
        format!(r#"{{"Get":{{{rest},"len":3}}}}"#),
        format!(r#"{{"Get":{{"len":3,{rest}}}}}"#),
        format!(r#"{{"Get":{{"l\u0065n":3,{rest}}}}}"#),
        format!(r#"{{"Get":{{"later":{{"len":9}},"len":3,{rest}}}}}"#),
        format!(r#"{{"Get":{{"len":3,"later":{{"len":9}},{rest}}}}}"#),
        format!(r#"{{"Get": {{ "len" : 3 , {rest} }} }}"#),
        format!(r#"{{"Get":{{"later":["len","{{"],"len":3,{rest}}}}}"#),
    ];
    for line in lines {
        let input = format!("{line}\nabc\n");
        let (consumed, message) = MessageDecoder::new().decode(input.as_bytes()).unwrap();
        let Some(Message::Answer(body)) = message else { panic!("{line}") };
        assert_eq!((consumed, body.values.iter().next().unwrap().as_ref()), (input.len(), &b"abc"[..]), "{line}");
    }
    for line in [
        r#"{"Update":{"key":"len","value":[1],"revision":1}}"#,
        r#"{"Update":{"key":"a","value":"\"len\":3","revision":1}}"#,
    ] {
        let input = format!("{line}\n");
        let (consumed, message) = MessageDecoder::new().decode(input.as_bytes()).unwrap();
        assert!(matches!(message, Some(Message::Update { .. })) && consumed == input.len(), "{line}");
    }
}
