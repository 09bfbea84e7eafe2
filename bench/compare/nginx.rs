//! nginx, in two roles: the stub that answers reads with fixed JSON, and a proxy before it to compare with.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::api::Api;
use crate::harness::eventually;
use crate::harness::process::{Process, free_port};

pub fn is_there() -> bool {
    Command::new("nginx")
        .arg("-v")
        .output()
        .is_ok_and(|output| output.status.success())
}

/// One nginx with a configuration and a folder of its own, in one process.
pub struct Nginx {
    pub process: Process,
    pub ports: Vec<u16>,
}

impl Nginx {
    /// One server for each of `locations`, each on a port of its own; `upstreams` come before them.
    async fn start(dir: &Path, name: &str, upstreams: &str, locations: &[String]) -> Nginx {
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir).expect("a folder");
        let path = dir.display();
        let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {path}/{kind};\n"))
            .concat();
        let (mut servers, mut ports) = (String::new(), Vec::new());
        for location in locations {
            let port = free_port();
            servers += &format!("server {{ listen 127.0.0.1:{port};\n{location}\n}}\n");
            ports.push(port);
        }
        let text = format!(
            "daemon off; master_process off; worker_processes 1; pid {path}/pid; error_log {path}/error.log error;\n\
             events {{ worker_connections 4096; }}\n\
             http {{\naccess_log off; client_max_body_size 64m; client_body_buffer_size 1m;\n\
             keepalive_timeout 1h; keepalive_requests 1000000000;\n{temp}\
             proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header Host $host;\n\
             {upstreams}\n{servers}\n}}\n"
        );
        let file = dir.join("nginx.conf");
        std::fs::write(&file, text).expect("the configuration");
        let mut command = Command::new("nginx");
        command
            .arg("-e")
            .arg(dir.join("error.log"))
            .arg("-c")
            .arg(&file)
            .arg("-p")
            .arg(&dir);
        let log = dir.with_extension("log");
        let process = Process::spawn(command, &log, libc::SIGKILL).expect("nginx");
        let nginx = Nginx { process, ports };
        let api = Api::direct(&format!("http://127.0.0.1:{}", nginx.ports[0]));
        eventually(Duration::from_secs(20), "nginx answers", || {
            api.try_get("/api/v2/heartbeat")
        })
        .await;
        nginx
    }

    /// A stub for each of the given nodes: it answers `get` and `query` of records itself, and has the node behind it
    /// answer everything else, so that it passes for one.
    pub async fn stub(dir: &Path, nodes: &[u16], get: &str, query: &str) -> Nginx {
        let upstreams: String = nodes.iter().map(|port| upstream(*port)).collect();
        let locations: Vec<String> = nodes
            .iter()
            .map(|port| {
                let fixed = [("get", get), ("query", query)].map(|(operation, body)| {
                    assert!(
                        body.len() < 4000 && !body.contains(['\'', '$']),
                        "fits into nginx's configuration"
                    );
                    format!(
                        "location ~ ^/api/v2/tenants/default_tenant/.*/{operation}$ \
                         {{ default_type application/json; return 200 '{body}'; }}\n"
                    )
                });
                format!("{}location / {{ proxy_pass http://up{port}; }}", fixed.concat())
            })
            .collect();
        Nginx::start(dir, "stub", &upstreams, &locations).await
    }

    /// A proxy with connections that stay open to one server.
    pub async fn proxy(dir: &Path, port: u16) -> Nginx {
        let location = format!("location / {{ proxy_pass http://up{port}; }}");
        Nginx::start(dir, "nginx", &upstream(port), &[location]).await
    }
}

fn upstream(port: u16) -> String {
    format!("upstream up{port} {{ server 127.0.0.1:{port}; keepalive 256; keepalive_requests 1000000000; }}\n")
}
