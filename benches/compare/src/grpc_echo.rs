//! The reference of gRPC: a server of `nkv.v1.Kv` that only answers, with tonic on one thread.

use std::net::SocketAddr;

use tonic::codegen::tokio_stream::{self, Stream};
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::Result;

#[allow(clippy::all, unreachable_pub, dead_code)]
mod v1 {
    include!("../../../crates/nkv-grpc/src/generated/nkv.v1.rs");
}

use v1::kv_server::{Kv, KvServer};

/// Answers gets and puts for ever: what a put sent is thrown away, and a get is answered with a value of the usual length.
pub(crate) fn serve(addr: SocketAddr) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(Server::builder().tcp_nodelay(true).add_service(KvServer::new(Echo)).serve(addr))?)
}

struct Echo;

type Answered<T> = std::result::Result<Response<T>, Status>;

fn none<T>() -> Answered<T> {
    Err(Status::unimplemented("an echo gets and puts"))
}

#[tonic::async_trait]
impl Kv for Echo {
    async fn get(&self, _: Request<v1::GetRequest>) -> Answered<v1::GetResponse> {
        let value = vec![b'x'; 100].into();
        Ok(Response::new(v1::GetResponse { value, revision: 1, epoch: "0".repeat(32), ttl_ms: None }))
    }

    async fn put(&self, _: Request<v1::PutRequest>) -> Answered<v1::PutResponse> {
        Ok(Response::new(v1::PutResponse { revision: 1, epoch: "0".repeat(32) }))
    }

    async fn delete(&self, _: Request<v1::DeleteRequest>) -> Answered<v1::DeleteResponse> {
        none()
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Answered<v1::ListResponse> {
        none()
    }

    async fn exists(&self, _: Request<v1::ExistsRequest>) -> Answered<v1::ExistsResponse> {
        none()
    }

    async fn write(&self, _: Request<v1::WriteRequest>) -> Answered<v1::WriteResponse> {
        none()
    }

    type WatchStream = std::pin::Pin<Box<dyn Stream<Item = std::result::Result<v1::WatchResponse, Status>> + Send>>;

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Answered<Self::WatchStream> {
        Ok(Response::new(Box::pin(tokio_stream::empty())))
    }

    async fn trace(&self, _: Request<v1::TraceRequest>) -> Answered<v1::TraceResponse> {
        none()
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Answered<v1::StatsResponse> {
        none()
    }
}
