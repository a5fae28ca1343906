//! Health and reflection, as other programs' tools use them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{Server, raw_call, timely};
use nkv_grpc::FILE_DESCRIPTOR_SET;
use prost::Message;
use tokio_stream::StreamExt;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::{v1, v1alpha};

const SERVICES: [&str; 4] = ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "kv.Client", "nkv.v1.Kv"];

#[tokio::test]
async fn reflection_lists_the_services_and_gives_their_descriptors() {
    use v1::server_reflection_request::MessageRequest;
    use v1::server_reflection_response::MessageResponse;
    let server = Server::start().await;
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(server.channel().await);
    let ask =
        |message_request| v1::ServerReflectionRequest { host: String::new(), message_request: Some(message_request) };
    let requests = vec![
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol("nkv.v1.Kv".into())),
        ask(MessageRequest::FileContainingSymbol("kv.Client".into())),
    ];
    let mut answers = client.server_reflection_info(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let mut next = async || timely(answers.next()).await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(listed) = next().await else { panic!("no list") };
    let mut names: Vec<_> = listed.service.into_iter().map(|service| service.name).collect();
    names.sort();
    assert_eq!(names, SERVICES);
    let whole = prost_types::FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    for name in ["nkv/v1/kv.proto", "kv.proto"] {
        let MessageResponse::FileDescriptorResponse(found) = next().await else { panic!("no file") };
        let file = prost_types::FileDescriptorProto::decode(&found.file_descriptor_proto[0][..]).unwrap();
        assert!(file.name() == name && whole.file.contains(&file));
    }
}

#[tokio::test]
async fn the_earlier_version_of_reflection_is_there_too() {
    use v1alpha::server_reflection_request::MessageRequest;
    use v1alpha::server_reflection_response::MessageResponse;
    let server = Server::start().await;
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(server.channel().await);
    let message_request = Some(MessageRequest::ListServices(String::new()));
    let request = v1alpha::ServerReflectionRequest { host: String::new(), message_request };
    let answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
    let answer = timely(answers.into_inner().next()).await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(listed)) = answer.message_response else { panic!("no list") };
    assert!(listed.service.iter().any(|service| service.name == "nkv.v1.Kv"));
    assert!(listed.service.iter().any(|service| service.name == "kv.Client"));
}

// What reflection shows is what a client without the files calls: each method by its path.
#[tokio::test]
async fn every_method_that_reflection_shows_is_there() {
    let server = Server::start().await;
    let channel = server.channel().await;
    let set = prost_types::FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    let mut count = 0;
    for file in &set.file {
        for service in &file.service {
            for method in service.method.iter().filter(|method| !method.server_streaming()) {
                let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                let answer = raw_call(&channel, path.leak(), b"").await;
                assert_ne!(answer.map_err(|status| status.code()), Err(Code::Unimplemented), "{}", method.name());
                count += 1;
            }
        }
    }
    assert_eq!(count, 12);
}

#[tokio::test]
async fn health_is_serving_until_the_node_stops() {
    let server = Server::start().await;
    let mut client = HealthClient::new(server.channel().await);
    for service in ["", "nkv.v1.Kv", "kv.Client"] {
        let request = HealthCheckRequest { service: service.into() };
        let answer = client.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
    let unknown = client.check(HealthCheckRequest { service: "x".into() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);

    let mut watched = client.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(timely(watched.message()).await.unwrap().unwrap().status(), ServingStatus::Serving);
    let stopped = tokio::spawn(server.node.shutdown());
    // First that it does not serve, then the end.
    assert_eq!(timely(watched.message()).await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert_eq!(timely(watched.message()).await.unwrap_err().code(), Code::Unavailable);
    timely(stopped).await.unwrap().unwrap();
    timely(server.door).await.unwrap();
}
