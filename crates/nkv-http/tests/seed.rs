//! The flows of kv-store: its published curl lines, and what its command line sends.

mod support;

use support::TestDoor;

const FORM: (&str, &str) = ("Content-Type", "application/x-www-form-urlencoded");

#[tokio::test]
async fn the_published_lines_are_answered_as_they_were() {
    let door = TestDoor::start().await;
    let host =
        format!("Host: 0.0.0.0:23333\r\nConnection: close\r\nUser-Agent: curl/7.79\r\n{}: {}\r\n", FORM.0, FORM.1);
    let send = async |path: &str, body: &str| {
        let request = format!("POST {path} HTTP/1.1\r\n{host}Content-Length: {}\r\n\r\n{body}", body.len());
        door.say(request.as_bytes()).await
    };
    let set = send("/set", r#"{"Key":"Name","Value":"<A&B>"}"#).await;
    assert_eq!((set.status, set.text()), (200, "\"SUCCESS\"\n".into()));
    let get = send("/get", r#"{"Key":"Name"}"#).await;
    assert_eq!((get.status, get.text()), (200, "{\"Key\":\"Name\",\"Value\":\"\\u003cA\\u0026B\\u003e\"}\n".into()));
    // Also as its command line does: JSON, and names in any letter case.
    let json = [("Content-Type", "application/json")];
    let reply = door.send("POST", "/set", &json, br#"{"key":"Age","value":"20","other":1}"#).await;
    assert_eq!(reply.text(), "\"SUCCESS\"\n");
    for method in ["GET", "POST", "PUT"] {
        let all = door.send(method, "/getall", &[], b"").await;
        assert_eq!((all.status, all.text()), (200, "{\"Age\":\"20\",\"Name\":\"\\u003cA\\u0026B\\u003e\"}\n".into()));
    }
    // An absent key is a 404 now, with the original's text, which its command line cannot take for a pair.
    let absent = send("/get", r#"{"Key":"None"}"#).await;
    assert_eq!((absent.status, absent.text().as_str()), (404, "The given key is not present in the data store.\n"));
    for (body, text) in [("", "EOF\n"), ("{\"Key\":", "unexpected EOF\n")] {
        let reply = send("/get", body).await;
        assert_eq!((reply.status, reply.text().as_str()), (400, text), "{body}");
    }
    // A key that nkv cannot hold, and never a pattern.
    for key in ["", "a..b", "a.*", "*"] {
        for path in ["/get", "/set"] {
            let reply = send(path, &format!("{{\"Key\":\"{key}\",\"Value\":\"\"}}")).await;
            assert_eq!(reply.status, 400, "{path} {key}: {reply:?}");
        }
    }
    assert_eq!(send("/set", r#"{"Key":"k"}"#).await.status, 200, "an empty value");
    assert_eq!(send("/get/", "").await.status, 404);
    let plain = send("/subscribe", "").await;
    assert_eq!((plain.status, plain.text().as_str()), (400, "Bad Request\n"));
    assert_eq!(plain.header("sec-websocket-version").as_deref(), Some("13"));
    assert_eq!(plain.header("access-control-allow-origin"), None);
}

#[tokio::test]
async fn values_that_are_no_text_are_left_out() {
    let door = TestDoor::start().await;
    door.nkv.put("bytes", vec![0xff]).await.unwrap();
    door.nkv.put("text", "x").await.unwrap();
    assert_eq!(door.send("POST", "/get", &[], br#"{"Key":"bytes"}"#).await.status, 422);
    assert_eq!(door.get("/getall").await.text(), "{\"text\":\"x\"}\n");
}

#[tokio::test]
async fn pairs_are_sorted_by_bytes_and_bounded() {
    let mut limits = nkv_node::Limits::default();
    limits.value_len_max = 8 << 20;
    let door = TestDoor::with(nkv_http::Options::default(), limits).await;
    for key in ["a.b", "a-b", "b", "a"] {
        door.nkv.put(key, "").await.unwrap();
    }
    assert_eq!(door.get("/getall").await.text(), "{\"a\":\"\",\"a-b\":\"\",\"a.b\":\"\",\"b\":\"\"}\n");
    for n in 0..9 {
        door.nkv.put(format!("big.{n}"), vec![b'x'; 8 << 20]).await.unwrap();
    }
    assert_eq!(door.get("/getall").await.status, 413);
}
