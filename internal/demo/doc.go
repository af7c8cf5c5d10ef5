// Package demo shows the main job: a redis server with many clients loses its
// host, and the clients do not notice.
//
// Run builds a lab of hosts (client, primary, standby, log), runs a real
// redis-server and ftckpt itself on them, loads the server with clients that
// check every byte, injects the fault and tells what happened. What it tells is
// made by pure functions: a Timeline from the run's events and results, and
// from it a text, a Summary, and a page (WriteReport).
package demo
