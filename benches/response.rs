//! Times the response with an image of 1024 x 1024 pixels: encoding the file, Base64, JSON, socket.
//!
//! `cargo bench --bench response`. The pipeline returns a prepared image at once, so the time from
//! the request to the last byte is that of the server alone. With `-- --quick` it sends one request
//! of each kind, which shows that the benchmark still runs.

#![expect(clippy::print_stdout, reason = "prints its results")]

use std::error::Error;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use kiln::adapters::AdapterStore;
use kiln::checkpoint::Checkpoint;
use kiln::engine::{Engine, EngineSettings};
use kiln::request::Limits;
use kiln::server::{App, LoadedModel, Settings};
use kiln_models::job::RgbImage;
use kiln_models::pipeline::{ImageSizes, ModelInfo};
use kiln_models::testing::{self, FakePipeline};

const SIDE: usize = 1024;
const ROUNDS: usize = 21;

/// Smooth shapes with a little noise, which compress about as well as a photograph.
fn image() -> RgbImage {
    let mut state = 1_u32;
    let mut pixels = Vec::with_capacity(SIDE * SIDE * 3);
    for y in 0..SIDE {
        for x in 0..SIDE {
            for channel in 0..3_u8 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let noise = f64::from(state >> 24) / 32.0;
                let (x, y) = (x as f64 / 90.0, y as f64 / 70.0);
                let shape = (x + f64::from(channel)).sin() * (y - f64::from(channel)).cos();
                pixels.push((124.0 + 100.0 * shape + noise) as u8);
            }
        }
    }
    RgbImage {
        height: SIDE,
        width: SIDE,
        pixels,
    }
}

/// Starts the server, which runs until the process ends.
fn serve() -> Result<SocketAddr, Box<dyn Error>> {
    let sizes = ImageSizes {
        multiple: 16,
        max_side: SIDE,
        default_side: SIDE,
    };
    let info = ModelInfo {
        sizes,
        ..testing::model_info()
    };
    let image = image();
    let pipeline = FakePipeline::new(info).images(move |_, _| image.clone());
    let settings = EngineSettings {
        max_queue: 0,
        max_started: 1,
        max_memory: None,
        adapter_cache_bytes: usize::MAX,
        max_step_tokens: None,
        warm_up: None,
    };
    let engine = Engine::start(Box::new(pipeline), settings);
    let app = App::new(Settings::new("none"));
    app.set_model(LoadedModel {
        engine: Some(engine),
        tokenizer: Checkpoint::demo()?.tokenizer()?.into(),
        limits: Limits::for_sizes(sizes),
        adapters: AdapterStore::default(),
        prompt_guide: None,
    });
    let listener = TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let runtime = tokio::runtime::Runtime::new()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            kiln::server::serve(listener, app, std::future::pending()).await
        })
    });
    Ok(address)
}

/// Sends a request. Returns the time to the last byte of the response, and its size in bytes.
fn post(address: SocketAddr, path: &str, body: &str) -> Result<(Duration, usize), Box<dyn Error>> {
    let mut stream = TcpStream::connect(address)?;
    let started = Instant::now();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let took = started.elapsed();
    if !answer.starts_with(b"HTTP/1.1 200") {
        return Err(String::from_utf8_lossy(&answer[..answer.len().min(400)]).into());
    }
    Ok((took, answer.len()))
}

fn main() -> Result<(), Box<dyn Error>> {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let rounds = if quick { 1 } else { ROUNDS };
    let address = serve()?;
    let images = "/v1/images/generations";
    let chat = "/v1/chat/completions";
    for (name, path, body) in [
        (
            "chat, PNG",
            chat,
            r#"{"messages":[{"role":"user","content":"x"}],"num_inference_steps":1}"#,
        ),
        (
            "images, PNG",
            images,
            r#"{"prompt":"x","num_inference_steps":1}"#,
        ),
        (
            "images, PNG as a file",
            images,
            r#"{"prompt":"x","num_inference_steps":1,"response_format":"file"}"#,
        ),
        (
            "images, PNG, output_compression 50",
            images,
            r#"{"prompt":"x","num_inference_steps":1,"output_compression":50}"#,
        ),
        (
            "images, JPEG, output_compression 90",
            images,
            r#"{"prompt":"x","num_inference_steps":1,"output_format":"jpeg","output_compression":90}"#,
        ),
        (
            "images, WebP, output_compression 80",
            images,
            r#"{"prompt":"x","num_inference_steps":1,"output_format":"webp","output_compression":80}"#,
        ),
    ] {
        let mut times = Vec::with_capacity(rounds);
        let mut bytes = 0;
        for _ in 0..rounds {
            let (took, length) = post(address, path, body)?;
            times.push(took.as_secs_f64() * 1e3);
            bytes = length;
        }
        times.sort_by(f64::total_cmp);
        println!(
            "{name}: median {:.1} ms, fastest {:.1} ms, {bytes} bytes",
            times[rounds / 2],
            times[0],
        );
    }
    Ok(())
}
