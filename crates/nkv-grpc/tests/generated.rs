//! What is generated of the .proto files is in the repository, so that a build needs no tool. These tests compare the two.
//!
//! After a change of a .proto file: `NKV_GENERATE=1 cargo test -p nkv-grpc --test generated`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet};

const PROTOS: [&str; 2] = ["nkv/v1/kv.proto", "kv.proto"];

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn compile() -> FileDescriptorSet {
    let mut compiler = protox::Compiler::new([here("proto")]).unwrap();
    compiler.include_source_info(true);
    compiler.open_files(PROTOS).unwrap();
    compiler.file_descriptor_set()
}

/// What reflection serves: without comments.
fn without_comments(mut set: FileDescriptorSet) -> FileDescriptorSet {
    set.file.iter_mut().for_each(|file| file.source_code_info = None);
    set
}

/// Compares a file with what it should be, or writes it if that was asked for.
fn check(path: &str, expected: &[u8]) {
    let path = here(path);
    if std::env::var_os("NKV_GENERATE").is_some() {
        std::fs::write(&path, expected).unwrap();
    }
    let found = std::fs::read(&path).unwrap_or_default();
    assert!(found == expected, "{} is not what the .proto files give: see the head of this test", path.display());
}

#[test]
fn the_generated_code_is_what_the_proto_files_give() {
    let (set, out) = (compile(), tempfile::tempdir().unwrap());
    tonic_prost_build::configure()
        .out_dir(out.path())
        .bytes(".")
        .btree_map(".")
        .build_transport(false)
        .emit_rerun_if_changed(false)
        .compile_fds(set.clone())
        .unwrap();
    for name in ["nkv.v1.rs", "kv.rs"] {
        check(&format!("src/generated/{name}"), &std::fs::read(out.path().join(name)).unwrap());
    }
    check("src/generated/descriptors.bin", &prost::Message::encode_to_vec(&without_comments(set)));
}

/// The published protocol stays as it is: numbers, types, names. What is added is added to the file too.
#[test]
fn the_published_messages_stay_as_they_are() {
    let mut summary = String::new();
    for file in &without_comments(compile()).file {
        let package = file.package();
        for service in &file.service {
            for method in &service.method {
                let stream = if method.server_streaming() { "stream " } else { "" };
                let (name, of) = (service.name(), method.name());
                let (input, output) = (method.input_type(), method.output_type());
                writeln!(summary, "/{package}.{name}/{of}({input}) -> {stream}{output}").unwrap();
            }
        }
        file.message_type.iter().for_each(|message| message_lines(package, message, &mut summary));
        file.enum_type.iter().for_each(|values| enum_lines(package, values, &mut summary));
    }
    check("tests/golden/messages.txt", summary.as_bytes());
}

fn message_lines(scope: &str, message: &DescriptorProto, out: &mut String) {
    let name = format!("{scope}.{}", message.name());
    for field in &message.field {
        writeln!(out, "{name} {} {} {}", field.number(), field.name(), type_of(field)).unwrap();
    }
    message.nested_type.iter().for_each(|nested| message_lines(&name, nested, out));
    message.enum_type.iter().for_each(|values| enum_lines(&name, values, out));
}

fn enum_lines(scope: &str, values: &EnumDescriptorProto, out: &mut String) {
    for value in &values.value {
        writeln!(out, "{scope}.{} {} {}", values.name(), value.number(), value.name()).unwrap();
    }
}

fn type_of(field: &FieldDescriptorProto) -> String {
    let name = match field.r#type() {
        Type::Message | Type::Enum => field.type_name().to_owned(),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    };
    match (field.label(), field.proto3_optional(), field.oneof_index) {
        (Label::Repeated, ..) => format!("repeated {name}"),
        (_, true, _) => format!("optional {name}"),
        (_, _, Some(_)) => format!("oneof {name}"),
        _ => name,
    }
}
