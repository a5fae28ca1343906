//! What the OpenAPI document says there is, is there, and nothing else.

mod support;

use serde_json::Value;
use support::TestDoor;

const METHODS: [&str; 5] = ["get", "head", "put", "post", "delete"];

/// An operation of the document.
#[derive(Debug)]
struct Operation {
    path: String,
    method: String,
    /// Name, and a value that may be given.
    parameters: Vec<(String, String)>,
    statuses: Vec<String>,
}

impl Operation {
    fn of(path: &str, method: &str, item: &Value) -> Operation {
        let operation = &item[method];
        let parameters = operation["parameters"].as_array().into_iter().flatten();
        let in_query = parameters.filter(|parameter| parameter["in"] == "query");
        let parameters = in_query.map(|parameter| (text(&parameter["name"]), value_of(&parameter["schema"]))).collect();
        let statuses = operation["responses"].as_object().expect("responses").keys().cloned().collect();
        Operation { path: path.replace("{key}", "lamp.hall"), method: method.to_uppercase(), parameters, statuses }
    }

    /// Its path with the parameters that it needs; streams have an end.
    fn target(&self, given: &[(String, String)]) -> String {
        let mut given = given.to_vec();
        let mut need = |name: &str, value: &str| {
            if self.parameters.iter().any(|(known, _)| known == name) && given.iter().all(|(known, _)| known != name) {
                given.push((name.to_owned(), value.to_owned()));
            }
        };
        need("pattern", "lamp");
        need("wait", "1ms");
        let query: Vec<_> = given.iter().map(|(name, value)| format!("{name}={value}")).collect();
        format!("{}?{}", self.path, query.join("&"))
    }

    fn body(&self) -> &'static [u8] {
        if self.path == "/v1/batch" { b"[]" } else { b"" }
    }
}

fn text(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}

/// A value that a parameter with this schema may have.
fn value_of(schema: &Value) -> String {
    match (&schema["example"], &schema["enum"][0], &schema["type"]) {
        (Value::String(example), ..) => example.clone(),
        (_, Value::String(word), _) => word.clone(),
        (_, Value::Bool(flag), _) => flag.to_string(),
        (.., kind) if kind == "integer" => "1".into(),
        _ => "lamp".into(),
    }
}

async fn operations(door: &TestDoor) -> Vec<Operation> {
    let document = door.get("/v1/openapi.json").await.json();
    let mut all = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        let methods = METHODS.iter().filter(|method| item.get(**method).is_some());
        all.extend(methods.map(|method| Operation::of(path, method, item)));
    }
    assert!(all.len() > 12, "{all:?}");
    all
}

#[tokio::test]
async fn every_operation_is_served_and_answers_with_a_status_that_it_names() {
    let door = TestDoor::start().await;
    for operation in operations(&door).await {
        door.put("lamp.hall", "on").await;
        let reply = door.send(&operation.method, &operation.target(&[]), &[], operation.body()).await;
        assert!(operation.statuses.contains(&reply.status.to_string()), "{operation:?}: {reply:?}");
        let is_there = reply.status == 200 || operation.path == "/v1/ws" && reply.status == 426;
        assert!(is_there, "{operation:?}: {reply:?}");
    }
}

#[tokio::test]
async fn other_methods_are_refused_with_those_that_there_are() {
    let door = TestDoor::start().await;
    let all = operations(&door).await;
    for operation in &all {
        let known = |method: &str| {
            // A HEAD is a GET whose body is left out, so that most need no mention.
            let method = if method == "HEAD" { "GET" } else { method };
            all.iter().any(|other| other.path == operation.path && other.method == method)
        };
        for method in METHODS.map(str::to_uppercase).iter().filter(|method| !known(method)) {
            let reply = door.send(method, &operation.path, &[], b"").await;
            if operation.path == "/v1/ws" {
                assert_eq!(reply.status, 426, "{method}: {reply:?}");
                continue;
            }
            assert_eq!(reply.status, 405, "{method} {operation:?}");
            assert!(method == "HEAD" || reply.problem() == "wrong-method", "{method} {operation:?}");
            let allowed = reply.header("allow").unwrap_or_default();
            assert!(allowed.split(", ").all(known) && allowed.contains(&operation.method), "{allowed}: {operation:?}");
        }
    }
}

#[tokio::test]
async fn every_parameter_is_known_and_no_other_is() {
    let door = TestDoor::start().await;
    for operation in operations(&door).await {
        for parameter in &operation.parameters {
            door.put("lamp.hall", "on").await;
            let target = operation.target(std::slice::from_ref(parameter));
            let reply = door.send(&operation.method, &target, &[], operation.body()).await;
            assert_eq!(reply.status, 200, "{target}: {reply:?}");
        }
        // Probes take anything.
        if operation.path.starts_with("/v1/") || operation.path == "/readyz" {
            let target = operation.target(&[("parameter".into(), "1".into())]);
            let reply = door.send(&operation.method, &target, &[], operation.body()).await;
            assert_eq!(reply.status, 400, "{target}: {reply:?}");
        }
    }
}

#[tokio::test]
async fn what_the_document_does_not_name_is_not_there() {
    let door = TestDoor::start().await;
    for path in
        ["/v1", "/v1/", "/v2/kv", "/v1/kvs", "/v1/watch/", "/v1/openapi", "/metrics/", "/page/", "/page/none.js"]
    {
        let reply = door.get(path).await;
        assert_eq!((reply.status, reply.problem()), (404, "no-such-path".into()), "{path}");
    }
}
