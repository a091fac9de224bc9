#!/bin/sh
# nginx as the checking client wants it: every answer names the pod and repeats the request's argument.
set -eu
mkdir -p /tmp/nginx
cat >/tmp/nginx/nginx.conf <<END
daemon off;
master_process off;
pid /tmp/nginx/pid;
error_log stderr warn;
worker_rlimit_nofile 16384;
events { worker_connections 8192; }
http {
  access_log off;
  default_type text/plain;
  keepalive_timeout 1d;
  keepalive_requests 1000000000;
  client_body_temp_path /tmp/nginx/body;
  proxy_temp_path /tmp/nginx/proxy;
  fastcgi_temp_path /tmp/nginx/fastcgi;
  uwsgi_temp_path /tmp/nginx/uwsgi;
  scgi_temp_path /tmp/nginx/scgi;
  server {
    listen 0.0.0.0:8080 backlog=4096;
    location / { return 200 "$(hostname)\n"; }
    location = /echo { return 200 "$(hostname) \$arg_t\n"; }
  }
}
END
exec nginx -e stderr -c /tmp/nginx/nginx.conf
